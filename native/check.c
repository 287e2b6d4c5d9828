/* Checks a built library against plain loops, for every instruction set that this CPU runs: `check LIBRARY`.
 *
 * Loads the library as a program would, so that it needs nothing but the C library and runs under an emulator (see
 * build.py, --check). Sizes are odd, rows are padded and the padding is watched. Prints the largest error of each
 * tensor, as a part of its largest element; the exit status says whether all are small. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check_reference.h"
#include "scan.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
static void *open_library(const char *path) { return (void *)LoadLibraryA(path); }
static void *find_symbol(void *library, const char *name) { return (void *)GetProcAddress((HMODULE)library, name); }
#else
#include <dlfcn.h>
static void *open_library(const char *path) {
    void *library = dlopen(path, RTLD_NOW);
    if (!library) printf("%s\n", dlerror());
    return library;
}
static void *find_symbol(void *library, const char *name) { return dlsym(library, name); }
#endif

static struct {
    int64_t (*abi_version)(void);
    const char *(*instruction_set)(const char *);
    int64_t (*checkpoint_floats)(const char *, int64_t, int64_t, int64_t, int64_t);
    int64_t (*exp2)(const char *, const float *, float *, int64_t, int64_t);
    int64_t (*scan_forward)(const char *, const zs_scan_args *), (*scan_backward)(const char *, const zs_scan_args *);
    int64_t (*conv_forward)(const char *, const zs_conv_args *), (*conv_backward)(const char *, const zs_conv_args *);
    int64_t (*norm_forward)(const char *, const zs_norm_args *), (*norm_backward)(const char *, const zs_norm_args *);
} zs;

static int load(const char *path) {
    void *library = open_library(path);
    if (!library) return 0;
    const char *const names[] = {"zs_abi_version",   "zs_instruction_set", "zs_checkpoint_floats", "zs_exp2",
                                 "zs_scan_forward", "zs_scan_backward",   "zs_conv_forward",      "zs_conv_backward",
                                 "zs_norm_forward", "zs_norm_backward"};
    void *const places[] = {&zs.abi_version,  &zs.instruction_set, &zs.checkpoint_floats, &zs.exp2,
                            &zs.scan_forward, &zs.scan_backward,   &zs.conv_forward,      &zs.conv_backward,
                            &zs.norm_forward, &zs.norm_backward};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *symbol = find_symbol(library, names[i]);
        if (!symbol) return 0;
        memcpy(places[i], &symbol, sizeof symbol);
    }
    return zs.abi_version() == ZS_ABI_VERSION;
}

static int failures;

static void expect(int holds, const char *what) {
    if (holds) return;
    failures++;
    printf("    FAILED: %s\n", what);
}

/* The largest error seen of each tensor, for the report. */
static struct {
    const char *name;
    double error[2]; /* by dtype */
} worst[64];
static int tensors_seen;

static void record(const char *name, double error, int dtype, double limit) {
    int i = 0;
    while (i < tensors_seen && strcmp(worst[i].name, name)) i++;
    if (i == tensors_seen) worst[tensors_seen++].name = name;
    if (!(error <= worst[i].error[dtype])) worst[i].error[dtype] = error;
    expect(error <= limit, name);
}

static void compare(const char *name, const tensor *got, const double *want) {
    if (!got->data) return;
    double error = 0, scale = 1e-30;
    for (int64_t i = 0; i < got->b * got->l * got->w; i++) {
        double x = get(got, i), e = fabs(x - want[i]);
        if (!(e <= error)) error = e; /* a NaN counts */
        if (fabs(want[i]) > scale) scale = fabs(want[i]);
    }
    const double exact = strcmp(name, "d_A") ? 3e-6 : 5e-6; /* dA sums up what the decays are off by */
    record(name, error / scale, got->dtype, got->dtype == ZS_BF16 ? 0x1p-8 : exact);
    expect(padding_is_intact(got), "the padding between rows is untouched");
}

#include "check_norm.h"

/* Threads of the caller must keep their denormals. */
static int denormals_work(void) {
    volatile float tiny = 1e-30f;
    volatile float product = tiny * 1e-10f;
    return product > 0;
}

typedef struct {
    int64_t b, l, d, n;
    int in_order, out_order, optional; /* optional: D, z and delta_bias are there */
    double step;                       /* 0: softplus; else delta is about this */
    int dtype, mixed;                            /* mixed: u, B and z in the other type */
} scan_case;

static void check_scan(const char *set, const scan_case *c) {
    const int other = c->mixed ? !c->dtype : c->dtype;
    scan_problem p = draw_scan(c->b, c->l, c->d, c->n, c->optional, c->step, c->dtype, other);
    int64_t *order = permutation(c->l);
    p.input_order = c->in_order ? order : NULL;
    p.output_order = c->out_order ? order : NULL;
    scan_results want = reference_scan(&p);
    scan_gradients got = blank_gradients(&p), again = blank_gradients(&p);
    const int64_t floats = zs.checkpoint_floats(set, c->b, c->l, c->d, c->n);
    float *checkpoints = malloc((size_t)floats * sizeof(float));
    for (int round = 0; round < 2; round++) {
        scan_gradients *g = round ? &again : &got;
        zs_scan_args a = scan_arguments(&p, g);
        a.threads = round ? 3 : 1;
        if (!round) {
            expect(zs.scan_forward(set, &a) == ZS_OK, "scan forward without checkpoints");
            compare("out", &g->out, want.out);
        }
        a.checkpoints = checkpoints;
        expect(zs.scan_forward(set, &a) == ZS_OK, "scan forward");
        expect(zs.scan_backward(set, &a) == ZS_OK, "scan backward");
    }
    expect(denormals_work(), "denormals after a call");
    compare("out", &got.out, want.out);
    for (int i = 0; i < GRADIENTS; i++) {
        compare(gradient_names[i], &got.of[i], want.of[i]);
        expect(same_bytes(&got.of[i], &again.of[i]), "the number of threads does not matter");
    }
    expect(same_bytes(&got.out, &again.out), "the number of threads does not matter");
    free(checkpoints);
    free(order);
}

static void check_conv(const char *set, int64_t b, int64_t l, int64_t d, int64_t width, int ordered, int biased,
                       int dtype) {
    tensor x = draw(b, l, d, dtype, 5, 1), d_out = draw(b, l, d, dtype, 0, 1), weight = draw(1, d, width, ZS_F32, 0, 1);
    tensor bias = biased ? draw(1, 1, d, ZS_F32, 0, 1) : absent();
    tensor out = blank(b, l, d, dtype, 3), d_x = blank(b, l, d, dtype, 1);
    tensor d_weight = blank(1, d, width, ZS_F32, 0), d_bias = biased ? blank(1, 1, d, ZS_F32, 0) : absent();
    int64_t *order = ordered ? permutation(l) : NULL;
    conv_results want = reference_conv(&x, &weight, &bias, order, &d_out);
    zs_conv_args a = {.batch = b, .length = l, .channels = d, .width = width, .threads = 2, .order = order};
    a.weight = weight.data;
    a.bias = bias.data;
    a.x = rows_of(&x);
    a.out = rows_of(&out);
    a.d_out = rows_of(&d_out);
    a.d_x = rows_of(&d_x);
    a.d_weight = d_weight.data;
    a.d_bias = d_bias.data;
    expect(zs.conv_forward(set, &a) == ZS_OK, "convolution forward");
    expect(zs.conv_backward(set, &a) == ZS_OK, "convolution backward");
    compare("conv out", &out, want.out);
    compare("conv d_x", &d_x, want.d_x);
    compare("conv d_weight", &d_weight, want.d_weight);
    compare("conv d_bias", &d_bias, want.d_bias);
    free(order);
}

static void check_exp2(const char *set) {
    enum { COUNT = 1 << 16 };
    static float x[COUNT], y[COUNT];
    for (int i = 0; i < COUNT; i++) {
        const float part = (float)i / COUNT;
        x[i] = i & 1 ? -powf(10, -9 * part) : -125.9f + 252.8f * part;
    }
    expect(zs.exp2(set, x, y, COUNT, 0) == ZS_OK, "exp2");
    double error = 0;
    for (int i = 0; i < COUNT; i++) {
        double e = fabs(y[i] / exp2(x[i]) - 1);
        if (!(e <= error)) error = e;
    }
    record("exp2", error, ZS_F32, 2e-7);
    for (int i = 0; i < COUNT; i++) x[i] *= i & 1 ? 1 : 0.95f;
    expect(zs.exp2(set, x, y, COUNT, 1) == ZS_OK, "decays");
    error = 0;
    for (int i = 0; i < COUNT; i++) { /* beside 1, or beside themselves if larger; less exact far out */
        double e = fabs(y[i] - exp2(x[i])) / (x[i] > 0 ? exp2(x[i]) * (1 + x[i] / 2) : 1);
        if (!(e <= error)) error = e;
    }
    record("decays", error, ZS_F32, 3e-7);
    const float special[] = {0, -0.0f, 1, -126, -1000, -INFINITY, 1000, INFINITY, NAN};
    zs.exp2(set, special, y, 9, 0);
    expect(y[0] == 1 && y[1] == 1 && y[2] == 2 && y[3] == 0x1p-126f, "exp2 is exact at integers");
    expect(y[4] <= 0x1p-126f && y[5] <= 0x1p-126f && y[4] >= 0 && y[5] >= 0, "exp2 goes down to nothing");
    expect(y[6] >= 0x1p127f && y[7] >= 0x1p127f, "exp2 goes up");
    expect(isnan(y[8]), "exp2 of a NaN");
    for (int i = 0; i < 22; i++) { /* whatever its payload */
        const uint32_t bits = 0x7fc00000u | 1u << i | (uint32_t)(i & 1) << 31;
        memcpy(&x[i], &bits, sizeof bits);
    }
    zs.exp2(set, x, y, 22, 0);
    for (int i = 0; i < 22; i++) expect(isnan(y[i]), "exp2 of a NaN with a payload");
}

static void check_refusals(const char *set) {
    scan_problem p = draw_scan(1, 8, 4, 2, 1, 0, ZS_F32, ZS_F32);
    const int64_t bad[][8] = {{0, 1, 2, 3, 4, 5, 6, 8}, {0, 1, 2, 3, 4, 5, 6, 6}, {-1, 1, 2, 3, 4, 5, 6, 7}};
    for (int i = 0; i < 3; i++) {
        scan_gradients g = blank_gradients(&p);
        zs_scan_args a = scan_arguments(&p, &g);
        a.output_order = bad[i];
        expect(zs.scan_forward(set, &a) == ZS_BAD_ORDER, "an order that is no permutation");
    }
}

/* A NaN in one batch entry must not leave it. */
static void check_nan(const char *set) {
    scan_problem p = draw_scan(2, 20, 9, 5, 1, 0, ZS_F32, ZS_F32);
    const uint32_t bits = 0x7fc00001u; /* with a payload, which integer arithmetic could turn into a number */
    memcpy((float *)p.delta.data + 3 * p.delta.stride + 2, &bits, sizeof bits);
    scan_gradients g = blank_gradients(&p);
    zs_scan_args a = scan_arguments(&p, &g);
    expect(zs.scan_forward(set, &a) == ZS_OK, "scan forward with a NaN");
    int inside = 0, outside = 0;
    for (int64_t i = 0; i < 2 * 20 * 9; i++) {
        const int reached = i < 20 * 9 && i / 9 >= 3 && i % 9 == 2;
        if (reached)
            inside += isnan(get(&g.out, i));
        else
            outside += isnan(get(&g.out, i));
    }
    expect(inside == 17 && outside == 0, "a NaN reaches the later steps of its channel and nothing else");
}

static void check_instruction_set(const char *set) {
    static const scan_case cases[] = {
        {1, 1, 1, 1, 0, 0, 1, 0, ZS_F32, 0},    {2, 35, 21, 16, 1, 1, 1, 0, ZS_F32, 0},
        {2, 33, 131, 16, 0, 1, 1, 0, ZS_F32, 0}, {1, 17, 40, 7, 1, 0, 0, 0.1, ZS_F32, 0},
        {3, 16, 300, 19, 1, 1, 1, 0, ZS_F32, 0}, {2, 35, 37, 16, 1, 1, 1, 0, ZS_BF16, 0},
        {1, 20, 20, 16, 0, 1, 1, 0, ZS_F32, 1},  {1, 20, 20, 3, 1, 1, 0, 0.1, ZS_BF16, 1},
        {1, 2000, 5, 8, 1, 1, 1, 0, ZS_F32, 0},  {4, 256, 192, 16, 1, 1, 1, 0, ZS_F32, 0},
        {2, 40, 21, 16, 1, 1, 1, 30, ZS_F32, 0}, /* decays of nothing */
        {1, 35, 256, 16, 1, 1, 1, 0, ZS_BF16, 0}, {2, 20, 150, 3, 0, 1, 0, 0.1, ZS_BF16, 0},
    };
    printf("%s\n", set);
    restart_draws(); /* the same problems, whatever sets came before */
    tensors_seen = 0;
    memset(worst, 0, sizeof worst);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_scan(set, &cases[i]);
    for (int64_t width = 1; width <= ZS_MAX_CONV_WIDTH; width += width < 5 ? 1 : 11)
        for (int kind = 0; kind < 4; kind++)
            check_conv(set, 1 + kind % 2, 1 + 17 * kind, 133 - 31 * kind, width, kind & 1, kind < 2,
                       kind == 3 ? ZS_BF16 : ZS_F32);
    check_conv(set, 2, 37, 256, 4, 1, 1, ZS_BF16);
    check_norms(set);
    check_exp2(set);
    check_refusals(set);
    check_nan(set);
    printf("    %-16s float32  bfloat16\n", "largest error");
    for (int i = 0; i < tensors_seen; i++) {
        printf("    %-16s %.1e", worst[i].name, worst[i].error[ZS_F32]);
        printf(worst[i].error[ZS_BF16] > 0 ? "  %.1e\n" : "\n", worst[i].error[ZS_BF16]);
    }
}

int main(int count, char **arguments) {
    if (count != 2 || !load(arguments[1])) {
        printf("check: expected the path of a library with interface version %d\n", ZS_ABI_VERSION);
        return 2;
    }
    const char *const sets[] = {"zen4", "avx512", "avx2", "sse2", "neon"};
    int checked = 0;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        if (!zs.instruction_set(sets[i])) continue;
        check_instruction_set(sets[i]);
        checked++;
    }
    expect(checked > 0, "no instruction set");
    printf("fastest: %s; %d failure(s)\n", zs.instruction_set(NULL), failures);
    return failures != 0;
}
