// Mamba-1's selective scan and its gradient (Gu and Dao, 2023, arXiv:2312.00752, eq. 2,
// discretized as in 3.3):
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = sum over the state of C_t h_t
//
// The naive twin is `naive_scan` in flow2lab/scan.py. One call takes channels c0 to c1 of one
// sequence, so that several can run side by side. Within it a vector of channels goes through all
// tokens: its n states stay in registers, and a token is a handful of instructions for each.
// Tensors of (n, d) have the channels side by side.
#include "common.h"

const int64_t MAX_STATE = 256;  // the largest n: `CppScan.takes` keeps larger ones away

template<class T>
static void scan_forward(
        const T* x, const T* dt,          // (l, d)
        const T* A,                       // (n, d)
        const T* B, const T* C,           // (l, n)
        const T* h_first,                 // (n, d) the state before the first token
        const uint8_t* reset,             // (l) not 0: forget the state before the token; or null
        T* y,                             // (l, d)
        T* kept,                          // (chunks, n, d) the state before each chunk
        T* h_last,                        // (n, d) the state behind the last token
        int64_t l, int64_t d, int64_t n,  // tokens, channels, state size
        int64_t chunk,                    // tokens to a chunk
        int64_t c0, int64_t c1) {         // the channels of this call
    VECTORS(T);
    V a[MAX_STATE], h[MAX_STATE];
    for (int64_t c = c0; c < c1; c += W) {
        const int64_t left = c1 - c < W ? c1 - c : W;
        for (int64_t j = 0; j < n; j++) {
            a[j] = load(A + j*d + c, left);
            h[j] = load(h_first + j*d + c, left);
        }
        for (int64_t t = 0; t < l; t++) {
            if (t % chunk == 0)
                for (int64_t j = 0; j < n; j++) store(kept + (t/chunk*n + j)*d + c, h[j], left);
            if (reset && reset[t])
                for (int64_t j = 0; j < n; j++) h[j] = V{};
            const V step = load(dt + t*d + c, left);
            const V input = step*load(x + t*d + c, left);
            const T *b = B + t*n, *read = C + t*n;
            V out = {};
            for (int64_t j = 0; j < n; j++) {
                h[j] = vector_exp(step*a[j])*h[j] + input*b[j];
                out += h[j]*read[j];
            }
            store(y + t*d + c, out, left);
        }
        for (int64_t j = 0; j < n; j++) store(h_last + j*d + c, h[j], left);
    }
}

// The gradients, chunk by chunk from the end. States and decays of a chunk are computed again
// from the state that was kept before it, in the cache. With q_t the gradient of h_t, e_t the
// decay and u_t = dt_t x_t the input:
//
//     q_t = e_{t+1} q_{t+1} + gy_t C_t
//     gC_t = sum of gy_t h_t over channels        gB_t = sum of q_t u_t over channels
//     gu_t = sum of q_t B_t over the state        gx_t = gu_t dt_t
//     gdt_t = gu_t x_t + sum of q_t e_t h_{t-1} A over the state
//     gA = sum of q_t e_t h_{t-1} dt_t over tokens
template<class T>
static void scan_backward(
        const T* x, const T* dt, const T* A, const T* B, const T* C,  // as in `scan_forward`
        const uint8_t* reset, const T* kept,
        const T* gy,    // (l, d) gradient of y
        T* gh,          // (n, d) gradient of the last state, replaced by the first's
        T* gx, T* gdt,  // (l, d)
        T* gA,          // (n, d) is added to
        T* gB, T* gC,   // (l, n) sums over the channels of this call
        T* work,        // 4 chunk n vectors
        int64_t l, int64_t d, int64_t n, int64_t chunk, int64_t c0, int64_t c1) {
    VECTORS(T);
    V a[MAX_STATE], g[MAX_STATE], ga[MAX_STATE], s[MAX_STATE];
    V* before = (V*)work;          // (chunk, n) the state before each token
    V* decays = before + chunk*n;  // (chunk, n)
    V* sum_b = decays + chunk*n;   // (chunk, n) for gB, each lane its own channels
    V* sum_c = sum_b + chunk*n;    // (chunk, n) for gC
    for (int64_t k = (l - 1)/chunk; k >= 0; k--) {
        const int64_t t0 = k*chunk, t1 = t0 + chunk < l ? t0 + chunk : l;
        std::memset((void*)sum_b, 0, 2*chunk*n*sizeof(V));
        for (int64_t c = c0; c < c1; c += W) {
            const int64_t left = c1 - c < W ? c1 - c : W;
            for (int64_t j = 0; j < n; j++) {
                a[j] = load(A + j*d + c, left);
                g[j] = load(gh + j*d + c, left);
                ga[j] = load(gA + j*d + c, left);
                s[j] = load(kept + (k*n + j)*d + c, left);
            }
            for (int64_t t = t0; t < t1; t++) {  // the states of the chunk once more
                const V step = load(dt + t*d + c, left);
                const V input = step*load(x + t*d + c, left);
                V *h = before + (t - t0)*n, *e = decays + (t - t0)*n;
                const T* b = B + t*n;
                const V keep = V{} + (T)!(reset && reset[t]);
                for (int64_t j = 0; j < n; j++) {
                    h[j] = s[j];
                    e[j] = vector_exp(step*a[j])*keep;
                    s[j] = e[j]*s[j] + input*b[j];
                }
            }
            for (int64_t t = t1 - 1; t >= t0; t--) {
                const V step = load(dt + t*d + c, left), xv = load(x + t*d + c, left);
                const V gv = load(gy + t*d + c, left), input = step*xv;
                V *h = before + (t - t0)*n, *e = decays + (t - t0)*n;
                V *sb = sum_b + (t - t0)*n, *sc = sum_c + (t - t0)*n;
                const T *b = B + t*n, *read = C + t*n;
                V gu = {}, gd = {};
                for (int64_t j = 0; j < n; j++) {
                    const V eh = e[j]*h[j];
                    const V q = g[j] + gv*read[j];  // gradient of the state behind this token
                    const V m = q*eh;
                    sc[j] += gv*(eh + input*b[j]);
                    sb[j] += q*input;
                    gu += q*b[j];
                    gd += m*a[j];
                    ga[j] += m*step;
                    g[j] = q*e[j];
                }
                store(gx + t*d + c, gu*step, left);
                store(gdt + t*d + c, gd + gu*xv, left);
            }
            for (int64_t j = 0; j < n; j++) {
                store(gh + j*d + c, g[j], left);
                store(gA + j*d + c, ga[j], left);
            }
        }
        for (int64_t i = 0; i < (t1 - t0)*n; i++) {
            T b = 0, c = 0;
            for (int64_t lane = 0; lane < W; lane++) {
                b += sum_b[i][lane];
                c += sum_c[i][lane];
            }
            gB[t0*n + i] = b;
            gC[t0*n + i] = c;
        }
    }
}

#define EXPORT_SCAN(T, S)                                                                         \
    extern "C" void scan_forward_##S(                                                             \
            const T* x, const T* dt, const T* A, const T* B, const T* C, const T* h_first,        \
            const uint8_t* reset, T* y, T* kept, T* h_last,                                       \
            int64_t l, int64_t d, int64_t n, int64_t chunk, int64_t c0, int64_t c1) {             \
        scan_forward<T>(x, dt, A, B, C, h_first, reset, y, kept, h_last, l, d, n, chunk, c0, c1); \
    }                                                                                             \
    extern "C" void scan_backward_##S(                                                            \
            const T* x, const T* dt, const T* A, const T* B, const T* C, const uint8_t* reset,    \
            const T* kept, const T* gy, T* gh, T* gx, T* gdt, T* gA, T* gB, T* gC, T* work,       \
            int64_t l, int64_t d, int64_t n, int64_t chunk, int64_t c0, int64_t c1) {             \
        scan_backward<T>(x, dt, A, B, C, reset, kept, gy, gh, gx, gdt, gA, gB, gC, work,          \
                         l, d, n, chunk, c0, c1);                                                 \
    }
EXPORT_SCAN(float, f32)
EXPORT_SCAN(double, f64)
