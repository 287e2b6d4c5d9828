/* Plain loops in double precision for check.c: tensors, random problems, scan and convolution with their gradients.
 * Everything lives until the program ends, in one pool. */
#ifndef ZIGMA_CHECK_REFERENCE_H
#define ZIGMA_CHECK_REFERENCE_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "scan.h"

/* ---- tensors ---- */

typedef struct {
    int64_t b, l, w, stride; /* (b, l, w), rows `stride` elements apart */
    int dtype;
    void *data; /* NULL: absent */
} tensor;

enum { PADDING_BYTE = 0x7f };

static void *memory(int64_t bytes) {
    static void **kept;
    static size_t count, room;
    void *p = malloc((size_t)(bytes ? bytes : 1));
    if (count == room) kept = realloc(kept, (room = 2 * room + 64) * sizeof *kept);
    if (!p || !kept) {
        printf("check: out of memory\n");
        exit(2);
    }
    return kept[count++] = p;
}

static double *doubles(int64_t count) {
    return memset(memory(count * (int64_t)sizeof(double)), 0, (size_t)count * sizeof(double));
}

static int64_t size_of(const tensor *t) { return t->dtype == ZS_F32 ? 4 : 2; }
static tensor absent(void) { return (tensor){0}; }

/* A tensor to be written, with `padding` elements between its rows. */
static tensor blank(int64_t b, int64_t l, int64_t w, int dtype, int64_t padding) {
    tensor t = {b, l, w, w + padding, dtype, NULL};
    t.data = memset(memory(b * l * t.stride * size_of(&t)), PADDING_BYTE, (size_t)(b * l * t.stride * size_of(&t)));
    return t;
}

static zs_rows rows_of(const tensor *t) {
    return (zs_rows){t->data, t->l * t->stride, t->stride, t->dtype};
}

static double get(const tensor *t, int64_t i) {
    const int64_t at = i / t->w * t->stride + i % t->w;
    float value;
    if (t->dtype == ZS_F32) return ((const float *)t->data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)t->data)[at] << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int padding_is_intact(const tensor *t) {
    for (int64_t row = 0; row < t->b * t->l; row++) {
        const unsigned char *p = (const unsigned char *)t->data + row * t->stride * size_of(t);
        for (int64_t i = t->w * size_of(t); i < t->stride * size_of(t); i++)
            if (p[i] != PADDING_BYTE) return 0;
    }
    return 1;
}

static int same_bytes(const tensor *a, const tensor *b) {
    return !a->data || !memcmp(a->data, b->data, (size_t)(a->b * a->l * a->stride * size_of(a)));
}

static uint64_t drawn; /* xorshift's state */
static void restart_draws(void) { drawn = 88172645463325252u; }

static double uniform(void) { /* [0, 1) */
    drawn ^= drawn << 13;
    drawn ^= drawn >> 7;
    drawn ^= drawn << 17;
    return (double)(drawn >> 11) * 0x1p-53;
}

static double normal(void) { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }

static tensor draw(int64_t b, int64_t l, int64_t w, int dtype, int64_t padding, double scale) {
    tensor t = blank(b, l, w, dtype, padding);
    for (int64_t i = 0; i < b * l * w; i++) {
        const int64_t at = i / w * t.stride + i % w;
        const float value = (float)(scale * normal());
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        if (dtype == ZS_F32)
            ((float *)t.data)[at] = value;
        else
            ((uint16_t *)t.data)[at] = (uint16_t)(bits >> 16);
    }
    return t;
}

static int64_t *permutation(int64_t l) {
    int64_t *p = malloc((size_t)l * sizeof *p);
    for (int64_t i = 0; i < l; i++) p[i] = i;
    for (int64_t i = l - 1; i > 0; i--) {
        int64_t j = (int64_t)(uniform() * (double)(i + 1)), swap = p[i];
        p[i] = p[j];
        p[j] = swap;
    }
    return p;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

/* ---- scan ---- */

enum { D_U, D_DELTA, D_A, D_B, D_C, D_D, D_Z, D_BIAS, GRADIENTS };
static const char *const gradient_names[] = {"d_u", "d_delta", "d_A", "d_B", "d_C", "d_D", "d_z", "d_delta_bias"};

typedef struct {
    int64_t b, l, d, n;
    int softplus;
    tensor u, delta, A, B, C, D, z, bias, d_out;
    const int64_t *input_order, *output_order;
} scan_problem;

typedef struct {
    double *out, *of[GRADIENTS];
} scan_results;

typedef struct {
    tensor out, of[GRADIENTS];
} scan_gradients;

/* step: 0 for softplus; else delta is uniform between `step` and twice that, with a bias of 0. */
static scan_problem draw_scan(int64_t b, int64_t l, int64_t d, int64_t n, int optional, double step, int dtype,
                              int other) {
    scan_problem p = {.b = b, .l = l, .d = d, .n = n, .softplus = step == 0};
    p.u = draw(b, l, d, other, 3, 1);
    p.delta = draw(b, l, d, step == 0 ? dtype : ZS_F32, 0, 1);
    if (step > 0)
        for (int64_t i = 0; i < b * l * d; i++) ((float *)p.delta.data)[i] = (float)(step * (1 + uniform()));
    p.A = draw(1, d, n, ZS_F32, 0, 1);
    for (int64_t i = 0; i < d * n; i++) ((float *)p.A.data)[i] = -expf(((float *)p.A.data)[i]);
    p.B = draw(b, l, n, other, 7, 1);
    p.C = draw(b, l, n, dtype, 0, 1);
    p.D = optional ? draw(1, 1, d, ZS_F32, 0, 1) : absent();
    p.z = optional ? draw(b, l, d, other, 1, 1) : absent();
    p.bias = optional ? draw(1, 1, d, ZS_F32, 0, p.softplus) : absent();
    p.d_out = draw(b, l, d, dtype, 0, 1);
    return p;
}

static tensor blank_like(const tensor *t, int64_t padding) {
    return t->data ? blank(t->b, t->l, t->w, t->dtype, padding) : absent();
}

static scan_gradients blank_gradients(const scan_problem *p) {
    return (scan_gradients){
        .out = blank_like(&p->u, 2),
        .of = {blank_like(&p->u, 1), blank_like(&p->delta, 0), blank_like(&p->A, 0), blank_like(&p->B, 3),
               blank_like(&p->C, 0), blank_like(&p->D, 0), blank_like(&p->z, 5), blank_like(&p->bias, 0)},
    };
}

static zs_scan_args scan_arguments(const scan_problem *p, const scan_gradients *g) {
    zs_scan_args a = {.batch = p->b, .length = p->l, .channels = p->d, .states = p->n, .threads = 1};
    a.delta_softplus = p->softplus;
    a.input_order = p->input_order;
    a.output_order = p->output_order;
    a.A = p->A.data, a.D = p->D.data, a.delta_bias = p->bias.data;
    a.u = rows_of(&p->u), a.delta = rows_of(&p->delta), a.B = rows_of(&p->B), a.C = rows_of(&p->C);
    a.z = rows_of(&p->z), a.out = rows_of(&g->out), a.d_out = rows_of(&p->d_out);
    a.d_u = rows_of(&g->of[D_U]), a.d_delta = rows_of(&g->of[D_DELTA]), a.d_B = rows_of(&g->of[D_B]);
    a.d_C = rows_of(&g->of[D_C]), a.d_z = rows_of(&g->of[D_Z]);
    a.d_A = g->of[D_A].data, a.d_D = g->of[D_D].data, a.d_delta_bias = g->of[D_BIAS].data;
    return a;
}

/* One channel of one batch entry; `states` holds l + 1 rows of n, the first of them zero. */
static void reference_channel(const scan_problem *p, int64_t batch, int64_t c, double *states, double *g,
                              scan_results *r) {
    const int64_t l = p->l, d = p->d, n = p->n;
    const double D = p->D.data ? get(&p->D, c) : 0, bias = p->bias.data ? get(&p->bias, c) : 0;
    memset(g, 0, (size_t)n * sizeof *g);
    for (int direction = 0; direction < 2; direction++) {
        for (int64_t step = 0; step < l; step++) {
            const int64_t k = direction ? l - 1 - step : step;
            const int64_t in = batch * l + (p->input_order ? p->input_order[k] : k);
            const int64_t at = (batch * l + (p->output_order ? p->output_order[k] : k)) * d + c;
            const double raw = get(&p->delta, in * d + c) + bias, dt = p->softplus ? softplus(raw) : raw;
            const double u = get(&p->u, in * d + c), z = p->z.data ? get(&p->z, at) : 0, gate = sigmoid(z);
            const double *before = states + k * n;
            double *s = states + (k + 1) * n, y = D * u;
            for (int64_t i = 0; i < n; i++) {
                if (!direction)
                    s[i] = exp(dt * get(&p->A, c * n + i)) * before[i] + dt * get(&p->B, in * n + i) * u;
                y += s[i] * get(&p->C, in * n + i);
            }
            if (!direction) {
                r->out[at] = p->z.data ? y * z * gate : y;
                continue;
            }
            const double d_out = get(&p->d_out, at), dy = p->z.data ? d_out * z * gate : d_out;
            double gB = 0, hA = 0;
            for (int64_t i = 0; i < n; i++) {
                const double A = get(&p->A, c * n + i), decay = exp(dt * A);
                g[i] += dy * get(&p->C, in * n + i);
                r->of[D_C][in * n + i] += dy * s[i];
                r->of[D_B][in * n + i] += g[i] * dt * u;
                gB += g[i] * get(&p->B, in * n + i);
                hA += g[i] * decay * before[i] * A;
                r->of[D_A][c * n + i] += g[i] * decay * before[i] * dt;
                g[i] *= decay;
            }
            const double d_delta = (u * gB + hA) * (p->softplus ? sigmoid(raw) : 1);
            r->of[D_U][in * d + c] = D * dy + dt * gB;
            r->of[D_DELTA][in * d + c] = d_delta;
            r->of[D_Z][at] = d_out * y * gate * (1 + z * (1 - gate));
            r->of[D_D][c] += dy * u;
            r->of[D_BIAS][c] += d_delta;
        }
    }
}

static scan_results reference_scan(const scan_problem *p) {
    const int64_t rows = p->b * p->l;
    scan_results r = {.out = doubles(rows * p->d)};
    const int64_t sizes[] = {rows * p->d, rows * p->d, p->d * p->n, rows * p->n, rows * p->n, p->d, rows * p->d, p->d};
    for (int i = 0; i < GRADIENTS; i++) r.of[i] = doubles(sizes[i]);
    double *states = doubles((p->l + 1) * p->n), *g = doubles(p->n);
    for (int64_t batch = 0; batch < p->b; batch++)
        for (int64_t c = 0; c < p->d; c++) reference_channel(p, batch, c, states, g, &r);
    return r;
}

/* ---- convolution ---- */

typedef struct {
    double *out, *d_x, *d_weight, *d_bias;
} conv_results;

static conv_results reference_conv(const tensor *x, const tensor *weight, const tensor *bias, const int64_t *order,
                                   const tensor *d_out) {
    const int64_t l = x->l, d = x->w, width = weight->w, count = x->b * l * d;
    conv_results r = {doubles(count), doubles(count), doubles(d * width), doubles(d)};
    for (int64_t i = 0; i < count; i++) {
        const int64_t batch = i / (l * d), k = i / d % l, c = i % d;
        double p = bias->data ? get(bias, c) : 0;
        for (int64_t j = 0; j < width; j++) {
            const int64_t step = k - (width - 1) + j;
            if (step < 0) continue;
            p += get(weight, c * width + j) * get(x, (batch * l + (order ? order[step] : step)) * d + c);
        }
        const double gate = sigmoid(p), dp = get(d_out, i) * gate * (1 + p * (1 - gate));
        r.out[i] = p * gate;
        r.d_bias[c] += dp;
        for (int64_t j = 0; j < width; j++) {
            const int64_t step = k - (width - 1) + j;
            if (step < 0) continue;
            const int64_t at = (batch * l + (order ? order[step] : step)) * d + c;
            r.d_weight[c * width + j] += dp * get(x, at);
            r.d_x[at] += dp * get(weight, c * width + j);
        }
    }
    return r;
}

#endif
