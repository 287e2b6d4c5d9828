/* Gradients of the selective scan on some units of channels: each chunk is recomputed from the states at its start
 * (scan_kernel.h) and gone through backwards, last chunk first. */
#ifndef ZIGMA_SCAN_BACKWARD_H
#define ZIGMA_SCAN_BACKWARD_H

#include "scan_kernel.h"

/* The recurrence of `recur` again, for BLOCK states, keeping what backward needs of every step:
 *   decays: exp(dt_k A) (given if BACKWARD_DECAYS_FIRST),  decayed: exp(dt_k A) s_{k-1},  both [step][BLOCK]
 * and adding dC_k = sum over channels of dy_k s_k to dC. */
INLINE void recompute(exponential how, int64_t n, int64_t steps, const float *A, const float *B, const float *C,
                      const float *dt, const float *dtu, const float *dy, const float *state, float *decays,
                      float *decayed, float *y, float *dC) {
    vec s[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) s[i] = vload(state + i * LANES);
    for (int64_t k = 0; k < steps; k++) {
        vec t = vload(dt + k * LANES), x = vload(dtu + k * LANES), d = vload(dy + k * LANES);
        vec sum[2] = {vload(y + k * LANES), vset(0.0f)}, to_sum[BLOCK];
#pragma GCC unroll 8
        for (int64_t i = 0; i < BLOCK; i++) {
            float *place = decays + (k * BLOCK + i) * LANES;
            vec decay = BACKWARD_DECAYS_FIRST ? vload(place) : decay_of(how, t, vload(A + i * LANES));
            if (!BACKWARD_DECAYS_FIRST) vstore(place, decay);
            s[i] = decay * s[i];
            vstore(decayed + (k * BLOCK + i) * LANES, s[i]);
            s[i] = vfma(x, vset(B[k * n + i]), s[i]);
            sum[i & 1] = vfma(s[i], vset(C[k * n + i]), sum[i & 1]);
            to_sum[i] = d * s[i];
        }
        vstore(y + k * LANES, sum[0] + sum[1]);
        vadd_sums8(dC + k * n, to_sum);
    }
}

/* Backward through one chunk, g = dL/ds carried towards earlier steps:
 *   g_k = dy_k C_k + exp(dt_{k+1} A) g_{k+1},   h_k = g_k exp(dt_k A) s_{k-1}
 *   dB_k += sum over channels of g_k dt_k u_k
 *   gB_k += <g_k, B_k>,  hA_k += <h_k, A>,  dA += dt_k h_k
 * On entry and exit `carry` is exp(dt A) g of the later step. A is scaled by log2(e), and so is hA. */
INLINE void recur_backward(int64_t n, int64_t steps, const float *A, const float *B, const float *C,
                           const float *dt, const float *dtu, const float *dy, const float *decays,
                           const float *decayed, float *carry, float *dA, float *dB, float *gB, float *hA) {
    vec g[BLOCK], sum_dA[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) {
        g[i] = vload(carry + i * LANES);
        sum_dA[i] = vload(dA + i * LANES);
    }
    for (int64_t k = steps - 1; k >= 0; k--) {
        vec t = vload(dt + k * LANES), x = vload(dtu + k * LANES), d = vload(dy + k * LANES), to_sum[BLOCK];
        vec sum_gB = vload(gB + k * LANES), sum_hA = vload(hA + k * LANES);
#pragma GCC unroll 8
        for (int64_t i = 0; i < BLOCK; i++) {
            g[i] = vfma(d, vset(C[k * n + i]), g[i]);
            to_sum[i] = g[i] * x;
            sum_gB = vfma(g[i], vset(B[k * n + i]), sum_gB);
            vec h = g[i] * vload(decayed + (k * BLOCK + i) * LANES);
            g[i] = g[i] * vload(decays + (k * BLOCK + i) * LANES);
            sum_hA = vfma(h, vload(A + i * LANES), sum_hA);
            sum_dA[i] = vfma(t, h, sum_dA[i]);
        }
        vstore(gB + k * LANES, sum_gB);
        vstore(hA + k * LANES, sum_hA);
        vadd_sums8(dB + k * n, to_sum);
    }
    for (int64_t i = 0; i < BLOCK; i++) {
        vstore(carry + i * LANES, g[i]);
        vstore(dA + i * LANES, sum_dA[i]);
    }
}

/* One vector of channels over one chunk, each array [step][LANES]. */
typedef struct {
    float u[CHUNK * LANES], dt[CHUNK * LANES], dtu[CHUNK * LANES], z[CHUNK * LANES], y[CHUNK * LANES];
    float slope[CHUNK * LANES];                        /* d dt / d delta */
    float d_out[CHUNK * LANES], dy[CHUNK * LANES];     /* dL/d out, dL/d (<s, C> + D u) */
    float gB[CHUNK * LANES], hA[CHUNK * LANES], e[CHUNK * LANES];
    float decays[CHUNK * BLOCK * LANES], decayed[CHUNK * BLOCK * LANES];
} backward_steps;

static void prepare_steps(const scan_job *job, const place *p, int64_t channel, int64_t count, backward_steps *w) {
    const zs_scan_args *a = job->args;
    const int64_t size = p->steps * LANES;
    load_steps(&a->u, p->batch, p->in, p->steps, channel, count, w->u);
    load_steps(&a->delta, p->batch, p->in, p->steps, channel, count, w->dt);
    load_steps(&a->d_out, p->batch, p->out, p->steps, channel, count, w->d_out);
    if (a->z.data) load_steps(&a->z, p->batch, p->out, p->steps, channel, count, w->z);
    vec bias = load_channels(a->delta_bias, channel, count), D = load_channels(a->D, channel, count);
    if (a->delta_softplus)
        for (int64_t k = 0; k < size; k += LANES) vstore(w->e + k, vexp_minus_abs(vload(w->dt + k) + bias));
    for (int64_t k = 0; k < size; k += LANES) {
        vec t = vload(w->dt + k) + bias, u = vload(w->u + k), slope = vset(1.0f);
        if (a->delta_softplus) {
            vec e = vload(w->e + k);
            slope = vsigmoid(t, e);
            t = vsoftplus(t, e);
        }
        vstore(w->slope + k, slope);
        vstore(w->dt + k, t);
        vstore(w->dtu + k, t * u);
        vstore(w->y + k, D * u);
        vstore(w->gB + k, vset(0.0f));
        vstore(w->hA + k, vset(0.0f));
    }
    if (!a->z.data) {
        memcpy(w->dy, w->d_out, sizeof w->dy);
        return;
    }
    /* silu(z) and its slope gate (1 + z (1 - gate)); z itself is not needed afterwards */
    for (int64_t k = 0; k < size; k += LANES) vstore(w->e + k, vexp_minus_abs(vload(w->z + k)));
    for (int64_t k = 0; k < size; k += LANES) {
        vec z = vload(w->z + k), gate = vsigmoid(z, vload(w->e + k)), d = vload(w->d_out + k);
        vstore(w->dy + k, d * z * gate);
        vstore(w->z + k, d * gate * vfma(z, vset(1.0f) - gate, vset(1.0f)));
    }
}

static void backward_vector(const scan_job *job, const place *p, int64_t channel, int64_t count, int64_t chunk,
                            const float *B, const float *C, float *dB, float *dC, float *carry, backward_steps *w) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states, at = p->batch * job->padded + channel, size = p->steps * LANES;
    const float *A = job->A_packed + channel * n;
    const float *start = a->checkpoints + checkpoint_offset(job, p->batch, chunk, channel);
    float *dA = job->A_partial + at * n;
    for (int64_t i = 0; i < n; i++) vprefetch(start + (n + i) * LANES); /* the next vector's */
    prepare_steps(job, p, channel, count, w);
    const int small = decays_are_small(job, w->dt, size, channel);
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t b = i * LANES;
        if (BACKWARD_DECAYS_FIRST) compute_decays(p->steps, small, A + b, w->dt, w->decays);
        if (small || BACKWARD_DECAYS_FIRST) /* as in forward_states */
            recompute(SMALL, n, p->steps, A + b, B + i, C + i, w->dt, w->dtu, w->dy, start + b, w->decays, w->decayed,
                      w->y, dC + i);
        else
            recompute(ANY, n, p->steps, A + b, B + i, C + i, w->dt, w->dtu, w->dy, start + b, w->decays, w->decayed,
                      w->y, dC + i);
        recur_backward(n, p->steps, A + b, B + i, C + i, w->dt, w->dtu, w->dy, w->decays, w->decayed, carry + b,
                       dA + b, dB + i, w->gB, w->hA);
    }
    vec D = load_channels(a->D, channel, count), dD = vset(0.0f), dbias = vset(0.0f);
    for (int64_t k = 0; k < size; k += LANES) { /* d_u in place of u, d_delta of slope, d_z of z */
        vec u = vload(w->u + k), gB = vload(w->gB + k), dy = vload(w->dy + k);
        vec ddelta = vfma(vload(w->hA + k), vset(1.0f / LOG2E), u * gB) * vload(w->slope + k);
        dbias = dbias + ddelta;
        dD = vfma(dy, u, dD);
        vstore(w->u + k, vfma(D, dy, vload(w->dt + k) * gB));
        vstore(w->slope + k, ddelta);
        vstore(w->z + k, vload(w->z + k) * vload(w->y + k));
    }
    store_steps(&a->d_u, p->batch, p->in, p->steps, channel, count, w->u);
    store_steps(&a->d_delta, p->batch, p->in, p->steps, channel, count, w->slope);
    if (a->d_z.data) store_steps(&a->d_z, p->batch, p->out, p->steps, channel, count, w->z);
    vstore(job->D_partial + at, vload(job->D_partial + at) + dD);
    vstore(job->bias_partial + at, vload(job->bias_partial + at) + dbias);
}

/* One unit of a chunk; the sums over its channels go to its own slot: units are added up afterwards, in their order. */
static void backward_unit(const scan_job *job, const place *p, int64_t chunk, int64_t unit, const float *B,
                          const float *C, float *dBC, float *carry, backward_steps *steps) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states;
    const place q = enter_units(job, p->batch, unit, 1);
    float *dB = dBC, *dC = dBC + CHUNK * n;
    memset(dBC, 0, (size_t)(2 * CHUNK * n) * sizeof(float));
    for (int64_t v = 0; v < q.vectors; v++) {
        int64_t channel = q.first + v * LANES;
        backward_vector(job, p, channel, a->channels - channel, chunk, B, C, dB, dC,
                        carry + (channel - p->first) * n, steps);
    }
    float *to = job->BC_partial + ((p->batch * job->units + unit) * a->length + p->start) * 2 * a->states;
    for (int64_t k = 0; k < p->steps; k++, to += 2 * a->states) {
        memcpy(to, dB + k * n, (size_t)a->states * sizeof(float));
        memcpy(to + a->states, dC + k * n, (size_t)a->states * sizeof(float));
    }
}

static void scan_backward(const scan_job *job, int64_t batch, int64_t unit, int64_t units, float *workspace) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states, size = CHUNK * n;
    float *B = workspace, *C = B + size, *dBC = C + size, *carry = dBC + 2 * size;
    backward_steps *steps = (backward_steps *)(carry + units * UNIT_CHANNELS * n);
    place p = enter_units(job, batch, unit, units);
    memset(carry, 0, (size_t)(p.vectors * LANES * n) * sizeof(float));
    for (int64_t chunk = job->chunks - 1; chunk >= 0; chunk--) {
        enter_chunk(&p, a, chunk);
        load_chunk(job, &a->B, &p, B);
        load_chunk(job, &a->C, &p, C);
        for (int64_t i = unit; i < min64(unit + units, job->units); i++)
            backward_unit(job, &p, chunk, i, B, C, dBC, carry, steps);
    }
}

static int64_t scan_workspace(const scan_job *job, int64_t units, int backward) {
    const int64_t n = job->states, carried = units * UNIT_CHANNELS * n;
    if (!backward) return carried + 2 * CHUNK * n + (int64_t)(sizeof(forward_steps) / sizeof(float));
    return carried + 4 * CHUNK * n + (int64_t)(sizeof(backward_steps) / sizeof(float));
}

#endif
