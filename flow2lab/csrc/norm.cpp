// The gated norm behind Mamba-2's scan, and its gradient, token by token:
//
//     u = x silu(z)        r = 1/sqrt(mean of u^2 + eps)        y = w u r
//
// The naive twin is `gated_norm` in flow2lab/scan.py with `TorchScan`. Where PyTorch makes a
// dozen passes over memory, this makes two over a row that is still in the cache, and keeps
// nothing but the inputs.
#include "common.h"

// One call's tensors; Python fills this in by position, 8 bytes to a field
template<class T> struct Norm {
    const T *x, *z, *w;                               // (l, d), (l, d) gate, (d)
    const T *g;                                       // (l, d) gradient of the output
    T *y, *gz, *gw;                                   // y: output or gradient of x; gw (d)
    int64_t x_step, z_step, g_step, y_step, gz_step;  // from one row to the next
    int64_t l, d;
    double eps;
};

// body(c, left) for each vector of d channels
template<class T, class Body>
static inline void each_vector(int64_t d, Body body) {
    VECTORS(T);
    for (int64_t c = 0; c < d; c += W) body(c, d - c);
}

template<class T>
static void norm_forward(const Norm<T>& f) {
    VECTORS(T);
    for (int64_t t = 0; t < f.l; t++) {
        const T *x = f.x + t*f.x_step, *z = f.z + t*f.z_step;
        T* y = f.y + t*f.y_step;
        V squares = {};
        each_vector<T>(f.d, [&](int64_t c, int64_t left) {
            const V gate = load(z + c, left);
            const V u = load(x + c, left)*gate*sigmoid<T>(gate);
            squares += u*u;
            store(y + c, u, left);
            prefetch_next(x + c + f.x_step);
            prefetch_next(z + c + f.z_step);
            prefetch_next<1>(y + c + f.y_step);
        });
        const T r = 1/std::sqrt(sum_of<T>(squares)/f.d + (T)f.eps);
        each_vector<T>(f.d, [&](int64_t c, int64_t left) {
            store(y + c, load(y + c, left)*r*load(f.w + c, left), left);
        });
    }
}

// With a = r^2 mean of (u g w): gu = (g w - u a) r, gw = sum of g u r, gx = gu silu(z), gz = gu x
// silu'(z)
template<class T>
static void norm_backward(const Norm<T>& f) {
    VECTORS(T);
    for (int64_t t = 0; t < f.l; t++) {
        const T *x = f.x + t*f.x_step, *z = f.z + t*f.z_step, *g = f.g + t*f.g_step;
        T *gx = f.y + t*f.y_step, *gz = f.gz + t*f.gz_step;
        V squares = {}, products = {};
        // gx and gz hold silu(z) and its slope for now
        each_vector<T>(f.d, [&](int64_t c, int64_t left) {
            const V gate = load(z + c, left), s = sigmoid<T>(gate);
            const V u = load(x + c, left)*gate*s;
            squares += u*u;
            products += u*load(g + c, left)*load(f.w + c, left);
            store(gx + c, gate*s, left);
            store(gz + c, s*(1 + gate*(1 - s)), left);
            prefetch_next(x + c + f.x_step);
            prefetch_next(z + c + f.z_step);
            prefetch_next(g + c + f.g_step);
            prefetch_next<1>(gx + c + f.y_step);
            prefetch_next<1>(gz + c + f.gz_step);
        });
        const T r = 1/std::sqrt(sum_of<T>(squares)/f.d + (T)f.eps);
        const T a = sum_of<T>(products)*r*r/f.d;
        each_vector<T>(f.d, [&](int64_t c, int64_t left) {
            const V xv = load(x + c, left), silu = load(gx + c, left);
            const V u = xv*silu, gv = load(g + c, left);
            const V gu = (gv*load(f.w + c, left) - u*a)*r;
            store(f.gw + c, load(f.gw + c, left) + gv*u*r, left);
            store(gx + c, gu*silu, left);
            store(gz + c, gu*xv*load(gz + c, left), left);
        });
    }
}

#define EXPORT_NORM(T, S)                                                    \
    extern "C" void norm_forward_##S(const Norm<T>* f) { norm_forward(*f); } \
    extern "C" void norm_backward_##S(const Norm<T>* f) { norm_backward(*f); }
EXPORT_NORM(float, f32)
EXPORT_NORM(double, f64)
