// The short convolution before a scan, with its activation, and its gradient. Each channel looks
// at its last K tokens, not beyond the last reset; w is stored oldest tap first:
//
//     z_t = bias + sum over j < K of w_{K-1-j} x_{t-j}
//     y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)
//
// The naive twin is `causal_conv` in flow2lab/scan.py with `TorchScan`. One call takes channels
// c0 to c1 of one sequence, 32 tokens by one vector of channels at a time. A window of K tokens
// stays in registers, and a token that begins a document finds it empty. What lies beside a
// vector is fetched while it is worked on.
#include "common.h"

// One call's tensors; Python fills this in by position, 8 bytes to a field
template<class T> struct Conv {
    const T *x, *w, *bias;                   // (l, d), (K, d), (d) or null
    const T *g;                              // (l, d) gradient of the output
    T *y;                                    // (l, d) output, or gradient of x
    T *gw, *gb;                              // (K, d), (d) are added to
    T *ahead;                               // ((c1 - c0)/W, K) zeros: gradients from tile to tile
    const uint8_t* reset;                    // (l) not 0 where a document begins, or null
    int64_t x_step, g_step, y_step, w_step;  // from one row to the next
    int64_t l, silu, c0, c1;
};

const int64_t TILE = 32;  // tokens

// body(t0, t1, c, left, w) for each tile, the last tokens first: tokens t0 to t1, the vector of
// channels at c, of which `left` are there, and its taps w
template<class T, int K, class Body>
static inline void each_tile(const Conv<T>& f, Body body) {
    VECTORS(T);
    V w[K];
    for (int64_t t0 = (f.l - 1)/TILE*TILE; t0 >= 0; t0 -= TILE)
        for (int64_t c = f.c0; c < f.c1; c += W) {
            const int64_t t1 = t0 + TILE < f.l ? t0 + TILE : f.l, left = f.c1 - c;
            for (int j = 0; j < K; j++) w[j] = load(f.w + j*f.w_step + c, left);
            body(t0, t1, c, left, w);
        }
}

// token(t, z_t, the window: x_t first) for tokens t0 to t1, beginning K - 1 tokens earlier to
// fill the window
template<class T, int K, class Token>
static inline void convolve(const Conv<T>& f, int64_t t0, int64_t t1, int64_t c, int64_t left,
                            const typename VectorOf<T>::V* w, Token token) {
    VECTORS(T);
    V x[K] = {};
    const V bias = f.bias ? load(f.bias + c, left) : V{};
    for (int64_t t = t0 < K ? 0 : t0 - K + 1; t < t1; t++) {
        for (int j = K - 1; j; j--) x[j] = f.reset && f.reset[t] ? V{} : x[j-1];
        x[0] = load(f.x + t*f.x_step + c, left);
        prefetch_next(f.x + t*f.x_step + c);
        V z = bias;
        for (int j = 0; j < K; j++) z += w[K-1-j]*x[j];
        if (t >= t0) token(t, z, x);
    }
}

template<class T, int K>
static void conv_forward(const Conv<T>& f) {
    VECTORS(T);
    each_tile<T, K>(f, [&](int64_t t0, int64_t t1, int64_t c, int64_t left, const V* w) {
        convolve<T, K>(f, t0, t1, c, left, w, [&](int64_t t, V z, const V*) {
            T* y = f.y + t*f.y_step + c;
            store(y, f.silu ? z*sigmoid<T>(z) : z, left);
            prefetch_next<1>(y);
        });
    });
}

// With gz the gradient of z, gz = g or g silu'(z): gx_t = sum of w_{K-1-j} gz_{t+j}, a window
// that looks ahead
template<class T, int K>
static void conv_backward(const Conv<T>& f) {
    VECTORS(T);
    each_tile<T, K>(f, [&](int64_t t0, int64_t t1, int64_t c, int64_t left, const V* w) {
        V gw[K], gb = load(f.gb + c, left), gz[TILE], window[K];
        V* ahead = (V*)f.ahead + (c - f.c0)/W*K;
        for (int j = 0; j < K; j++) {
            gw[j] = load(f.gw + j*f.w_step + c, left);
            window[j] = ahead[j];
        }
        convolve<T, K>(f, t0, t1, c, left, w, [&](int64_t t, V z, const V* x) {
            V g = load(f.g + t*f.g_step + c, left);
            prefetch_next(f.g + t*f.g_step + c);
            if (f.silu) {
                const V s = sigmoid<T>(z);
                g *= s*(1 + z*(1 - s));
            }
            gz[t - t0] = g;
            gb += g;
            for (int j = 0; j < K; j++) gw[K-1-j] += g*x[j];
        });
        for (int64_t t = t1 - 1; t >= t0; t--) {
            for (int j = K - 1; j; j--) window[j] = window[j-1];
            window[0] = gz[t - t0];
            V gx = {};
            for (int j = 0; j < K; j++) gx += w[K-1-j]*window[j];
            store(f.y + t*f.y_step + c, gx, left);
            prefetch_next<1>(f.y + t*f.y_step + c);
            if (f.reset && f.reset[t])
                for (int j = 0; j < K; j++) window[j] = V{};
        }
        store(f.gb + c, gb, left);
        for (int j = 0; j < K; j++) {
            store(f.gw + j*f.w_step + c, gw[j], left);
            ahead[j] = window[j];
        }
    });
}

#define EXPORT_CONV(T, S, K)                                                            \
    extern "C" void conv_forward##K##_##S(const Conv<T>* f) { conv_forward<T, K>(*f); } \
    extern "C" void conv_backward##K##_##S(const Conv<T>* f) { conv_backward<T, K>(*f); }
EXPORT_CONV(float, f32, 4)
EXPORT_CONV(double, f64, 4)
EXPORT_CONV(float, f32, 8)
EXPORT_CONV(double, f64, 8)
