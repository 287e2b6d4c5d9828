/* The pass between two mixers written out in double, and its comparison with the library's: part of check.c. */
#ifndef ZIGMA_CHECK_NORM_H
#define ZIGMA_CHECK_NORM_H

typedef struct {
    int64_t b, l, d;
    int layer_norm, ordered, full; /* full: with mix, gate, residual, weight, bias, shift and scale */
    int dtype;
} norm_case;

typedef struct {
    double *total, *normed, *modulated, *d_x, *d_mix, *d_gate, *d_scale, *d_shift, *d_weight, *d_bias;
} norm_results;

static double get_or(const tensor *t, int64_t i, double otherwise) { return t->data ? get(t, i) : otherwise; }

/* One row: `from` of the inputs to `row` of the outputs, and the row's gradients. */
static void reference_norm_row(const norm_case *c, const tensor *in, const tensor *d_out, double eps, int64_t batch,
                               int64_t from, int64_t row, norm_results *r) {
    enum { BASE, MIX, GATE, RESIDUAL, WEIGHT, BIAS, SHIFT, SCALE };
    const int64_t d = c->d, at = (batch * c->l + from) * d, to = (batch * c->l + row) * d, one = batch * d;
    double *x = doubles(d), *xhat = doubles(d), *g = doubles(d), mean = 0, square = 0, mean_g = 0, mean_gx = 0;
    for (int64_t i = 0; i < d; i++) {
        x[i] = get(&in[BASE], at + i) + get_or(&in[GATE], one + i, 1) * get_or(&in[MIX], at + i, 0) +
               get_or(&in[RESIDUAL], at + i, 0);
        mean += c->layer_norm ? x[i] / (double)d : 0;
    }
    for (int64_t i = 0; i < d; i++) square += (x[i] - mean) * (x[i] - mean) / (double)d;
    const double s = 1 / sqrt(square + eps);
    for (int64_t i = 0; i < d; i++) {
        const double w = get_or(&in[WEIGHT], i, 1), by = 1 + get_or(&in[SCALE], one + i, 0);
        xhat[i] = (x[i] - mean) * s;
        const double u = xhat[i] * w + get_or(&in[BIAS], i, 0), dm = get(&d_out[2], to + i);
        const double du = get(&d_out[1], to + i) + (in[SCALE].data ? dm * by : 0);
        r->total[to + i] = x[i];
        r->normed[to + i] = u;
        r->modulated[to + i] = u * by + get_or(&in[SHIFT], one + i, 0);
        r->d_scale[one + i] += dm * u;
        r->d_shift[one + i] += dm;
        r->d_weight[i] += du * xhat[i];
        r->d_bias[i] += du;
        g[i] = du * w;
        mean_g += c->layer_norm ? g[i] / (double)d : 0;
        mean_gx += g[i] * xhat[i] / (double)d;
    }
    for (int64_t i = 0; i < d; i++) {
        const double dx = get(&d_out[0], to + i) + s * (g[i] - mean_g - xhat[i] * mean_gx);
        r->d_x[at + i] = dx;
        r->d_mix[at + i] = dx * get_or(&in[GATE], one + i, 1);
        r->d_gate[one + i] += dx * get_or(&in[MIX], at + i, 0);
    }
}

static void check_norm(const char *set, const norm_case *c) {
    const int64_t b = c->b, l = c->l, d = c->d, sizes[8][2] = {{b, l}, {b, l}, {b, 1}, {b, l}, {1, 1}, {1, 1}, {b, 1}, {b, 1}};
    tensor in[8], outputs[3], d_out[3], grads[3], sums[5];
    for (int i = 0; i < 8; i++) /* residual, weight and bias are float32 */
        in[i] = i && !c->full ? absent()
                              : draw(sizes[i][0], sizes[i][1], d, i >= 3 && i <= 5 ? ZS_F32 : c->dtype, i < 4 ? 3 : 0, 1);
    for (int i = 0; i < 3; i++) {
        d_out[i] = draw(b, l, d, i ? c->dtype : ZS_F32, i, 1);
        outputs[i] = i == 2 && !c->full ? absent() : blank(b, l, d, i ? c->dtype : ZS_F32, 2);
        grads[i] = i && !c->full ? absent() : blank(b, l, d, i == 1 ? ZS_F32 : c->dtype, i); /* d_x, d_residual, d_mix */
    }
    for (int i = 0; i < 5; i++) sums[i] = c->full ? blank(i < 3 ? b : 1, 1, d, ZS_F32, 0) : absent();
    int64_t *order = c->ordered ? permutation(l) : NULL;
    norm_results r = {doubles(b * l * d), doubles(b * l * d), doubles(b * l * d), doubles(b * l * d), doubles(b * l * d),
                      doubles(b * d),     doubles(b * d),     doubles(b * d),     doubles(d),         doubles(d)};
    for (int64_t batch = 0; batch < b; batch++)
        for (int64_t row = 0; row < l; row++)
            reference_norm_row(c, in, d_out, 1e-5, batch, order ? order[row] : row, row, &r);

    zs_norm_args a = {.batch = b, .length = l, .width = d, .threads = 2, .layer_norm = c->layer_norm, .eps = 1e-5};
    a.gather = order;
    a.weight = in[4].data;
    a.bias = in[5].data;
    a.base = rows_of(&in[0]);
    a.mix = rows_of(&in[1]);
    a.gate = rows_of(&in[2]);
    a.residual = rows_of(&in[3]);
    a.shift = rows_of(&in[6]);
    a.scale = rows_of(&in[7]);
    a.total = rows_of(&outputs[0]);
    a.normed = rows_of(&outputs[1]);
    a.modulated = rows_of(&outputs[2]);
    expect(zs.norm_forward(set, &a) == ZS_OK, "norm forward");
    a.d_total = rows_of(&d_out[0]);
    a.d_normed = rows_of(&d_out[1]);
    if (c->full) a.d_modulated = rows_of(&d_out[2]);
    a.total = a.normed = a.modulated = (zs_rows){0};
    a.d_x = rows_of(&grads[0]);
    a.d_residual = rows_of(&grads[1]);
    a.d_mix = rows_of(&grads[2]);
    a.d_gate = sums[0].data;
    a.d_scale = sums[1].data;
    a.d_shift = sums[2].data;
    a.d_weight = sums[3].data;
    a.d_bias = sums[4].data;
    expect(zs.norm_backward(set, &a) == ZS_OK, "norm backward");
    compare("norm total", &outputs[0], r.total);
    compare("norm normed", &outputs[1], r.normed);
    compare("norm modulated", &outputs[2], r.modulated);
    compare("norm d_x", &grads[0], r.d_x);
    compare("norm d_residual", &grads[1], r.d_x);
    compare("norm d_mix", &grads[2], r.d_mix);
    const double *const wanted[] = {r.d_gate, r.d_scale, r.d_shift, r.d_weight, r.d_bias};
    const char *const names[] = {"norm d_gate", "norm d_scale", "norm d_shift", "norm d_weight", "norm d_bias"};
    for (int i = 0; i < 5; i++) compare(names[i], &sums[i], wanted[i]);
}

static void check_norms(const char *set) {
    static const norm_case cases[] = {
        {1, 1, 8, 0, 0, 0, ZS_F32},   {2, 35, 21, 0, 1, 1, ZS_F32},  {3, 70, 131, 1, 1, 1, ZS_F32},
        {1, 64, 768, 0, 1, 1, ZS_F32}, {2, 33, 40, 1, 0, 0, ZS_F32}, {2, 35, 37, 1, 1, 1, ZS_BF16},
        {1, 40, 64, 0, 1, 1, ZS_BF16}, {2, 9, 208, 1, 1, 1, ZS_BF16}, {1, 9, 208, 1, 1, 1, ZS_F32},
        {2, 5, 107, 0, 0, 1, ZS_F32},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_norm(set, &cases[i]);
}

#endif
