// What the kernels share: vectors, their exponential, and small matrix products that stay in
// registers.
//
// Everything is a template over T, float or double. A vector V holds 64 bytes: W = 16 floats or 8
// doubles side by side, in one register where the processor has such (AVX-512) and in several
// elsewhere. gcc and clang both know these types, so there are no intrinsics and no libraries.
// The last vector of a row is often not full: load and store take the number of values that are
// left, and read or write no more.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float   FloatVector  __attribute__((vector_size(64), aligned(4)));
typedef double  DoubleVector __attribute__((vector_size(64), aligned(8)));
typedef int32_t IntVector    __attribute__((vector_size(64), aligned(4)));

template<class T> struct VectorOf;
template<> struct VectorOf<float>  { typedef FloatVector V; };
template<> struct VectorOf<double> { typedef DoubleVector V; };

// Opens a function over T: its vector type V and the number W of values in one
#define VECTORS(T)                     \
    typedef typename VectorOf<T>::V V; \
    const int64_t W = 64/sizeof(T);    \
    (void)W

// The first `left` values from p, the rest of the vector zero
template<class T>
static inline typename VectorOf<T>::V load(const T* p, int64_t left) {
    VECTORS(T);
    V v = {};
    if (left >= W) std::memcpy(&v, p, 64);
    else std::memcpy(&v, p, left*sizeof(T));
    return v;
}

// The first `left` values of v to p
template<class T>
static inline void store(T* p, typename VectorOf<T>::V v, int64_t left) {
    VECTORS(T);
    if (left >= W) std::memcpy(p, &v, 64);
    else std::memcpy(p, &v, left*sizeof(T));
}

// ---- exponential and sigmoid ------------------------------------------------------------------

// exp of 16 floats at once, off by less than 2 units in the last place. x = k ln 2 + r with a
// whole k and a small r: e^r is a polynomial, and 2^k is put together from its bits
static inline FloatVector vector_exp(FloatVector x) {
    const FloatVector lowest = FloatVector{} - 87.f;       // lower ones give 0 all the same
    const FloatVector magic = FloatVector{} + 12582912.f;  // 1.5 * 2^23: adding it rounds
    x = x < lowest ? lowest : x;
    FloatVector shifted = x*1.44269504f + magic;
    FloatVector k = shifted - magic;
    FloatVector r = (x - k*0.693359375f) + k*2.12194440e-4f;  // ln 2 in two parts
    FloatVector p = FloatVector{} + 1.f/5040;
    p = p*r + 1.f/720;
    p = p*r + 1.f/120;
    p = p*r + 1.f/24;
    p = p*r + 1.f/6;
    p = p*r + .5f;
    p = p*r*r + r + 1.f;
    return p * (FloatVector)(((IntVector)shifted - (IntVector)magic + 127) << 23);
}

// Double precision is for tests and takes the library's
static inline DoubleVector vector_exp(DoubleVector x) {
    DoubleVector result;
    for (int i = 0; i < 8; i++) result[i] = std::exp(x[i]);
    return result;
}

// 1/(1 + e^-z), from the exponential of a negative number on either side, which cannot overflow
template<class T>
static inline typename VectorOf<T>::V sigmoid(typename VectorOf<T>::V z) {
    VECTORS(T);
    const V e = vector_exp(z < 0 ? z : -z);
    return (z < 0 ? e : V{} + 1)/(1 + e);
}

// ---- memory -----------------------------------------------------------------------------------

// Rows of a tensor: where the first begins, and how many values lie from one row to the next
template<class T> struct Rows {
    T* at;
    int64_t step;
    T* operator()(int64_t row) const { return at + row*step; }
};

// Have the processor fetch what lies 256 bytes on; write = 1 where it will be written
template<int write = 0, class T>
static inline void prefetch_next(const T* p) {
    __builtin_prefetch(p + 256/sizeof(T), write);
}

// Have it fetch a whole tile I (R, C), whose rows are `step` apart
template<class T>
static inline void prefetch_tile(const T* I, int64_t step, int64_t R, int64_t C) {
    for (int64_t r = 0; r < R; r++)
        for (int64_t c = 0; c < C; c += 64/sizeof(T))
            __builtin_prefetch(I + r*step + c);
}

template<class T>
static bool all_zero(const T* I, int64_t n) {
    for (int64_t i = 0; i < n; i++) if (I[i]) return false;
    return true;
}

// A copy O of I (R, C), the rows of O filled up with zeros to whole vectors
template<class T>
static void copy_padded(T* O, int64_t o_step, const T* I, int64_t i_step, int64_t R, int64_t C) {
    VECTORS(T);
    for (int64_t r = 0; r < R; r++)
        for (int64_t c = 0; c < C; c += W)
            store(O + r*o_step + c, load(I + r*i_step + c, C - c), W);
}

// Two vectors interleaved, a0 b0 a1 b1 ..., into r[0] and r[1]
static inline void interleave(FloatVector a, FloatVector b, FloatVector* r) {
    r[0] = FloatVector{a[0], b[0], a[1], b[1], a[2],  b[2],  a[3],  b[3],
                       a[4], b[4], a[5], b[5], a[6],  b[6],  a[7],  b[7]};
    r[1] = FloatVector{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
                       a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
}
static inline void interleave(DoubleVector a, DoubleVector b, DoubleVector* r) {
    r[0] = DoubleVector{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
    r[1] = DoubleVector{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
}

// O (C, R) = I' of I (R, C), a square of W by W at a time: interleaving its rows log2(W) times
// transposes it. whole: fill the rows of O up with zeros to whole vectors
template<class T>
static void transpose(T* O, int64_t o_step, const T* I, int64_t i_step,
                      int64_t R, int64_t C, bool whole) {
    VECTORS(T);
    V a[W], b[W];
    for (int64_t r = 0; r < R; r += W) for (int64_t c = 0; c < C; c += W) {
        for (int64_t i = 0; i < W; i++)
            a[i] = r + i < R ? load(I + (r + i)*i_step + c, C - c) : V{};
        for (int64_t round = 1; round < W; round *= 2) {
            for (int64_t i = 0; i < W/2; i++) interleave(a[i], a[i + W/2], b + 2*i);
            for (int64_t i = 0; i < W; i++) a[i] = b[i];
        }
        for (int64_t i = 0; i < W && c + i < C; i++)
            store(O + (c + i)*o_step + r, a[i], whole ? W : R - r);
    }
}

// ---- sums -------------------------------------------------------------------------------------

// The sum of the values in v, halves added to halves
template<class T>
static inline T sum_of(typename VectorOf<T>::V v) {
    VECTORS(T);
    T s[W];
    std::memcpy(s, &v, 64);
    for (int64_t half = W/2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

// O[i] = the sum of vector i of `count` vectors, a multiple of W: transposed, they are added lane
// by lane
template<class T, int64_t count>
static void sums_of(T* O, const T* vectors) {
    VECTORS(T);
    T turned[W*count];
    transpose(turned, count, vectors, W, count, W, true);
    for (int64_t k = 0; k < count; k += W) {
        V s = {};
        for (int64_t i = 0; i < W; i++) s += load(turned + i*count + k, W);
        store(O + k, s, W);
    }
}

// Vector k of the j-th unit vector
template<class T>
static inline typename VectorOf<T>::V unit(int64_t j, int64_t k) {
    VECTORS(T);
    V v = {};
    if (j/W == k) v[j%W] = 1;
    return v;
}

// ---- matrix products: O (R, N) += A (R, K) B (K, N) -------------------------------------------
// N is in whole vectors. A's element (r, k) lies at r ar + k ak, so a transposed A is the same
// call.

// R rows by M vectors of O, held in registers over all of K
template<class T, int R, int M>
static void multiply_tile(T* O, int64_t o_step, const T* A, int64_t ar, int64_t ak,
                          const T* B, int64_t b_step, int64_t K) {
    VECTORS(T);
    V s[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) s[r][m] = load(O + r*o_step + m*W, W);
    for (int64_t k = 0; k < K; k++) {
        V b[M];
        for (int m = 0; m < M; m++) b[m] = load(B + k*b_step + m*W, W);
        for (int r = 0; r < R; r++) {
            const T a = A[r*ar + k*ak];
            for (int m = 0; m < M; m++) s[r][m] += a*b[m];
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) store(O + r*o_step + m*W, s[r][m], W);
}

// All R rows of M vectors, in tiles as high as the registers allow: 6 by 4 or 3, 12 by 2 or 1;
// then what is left
template<class T, int M>
static void multiply_strip(T* O, int64_t o_step, const T* A, int64_t ar, int64_t ak,
                           const T* B, int64_t b_step, int64_t R, int64_t K) {
    const int most = M > 2 ? 6 : 12;
    for (; R >= most; R -= most, O += most*o_step, A += most*ar)
        multiply_tile<T, most, M>(O, o_step, A, ar, ak, B, b_step, K);
    if (M < 3 && R & 8) {
        multiply_tile<T, 8, M>(O, o_step, A, ar, ak, B, b_step, K);
        O += 8*o_step;
        A += 8*ar;
    }
    if (R & 4) {
        multiply_tile<T, 4, M>(O, o_step, A, ar, ak, B, b_step, K);
        O += 4*o_step;
        A += 4*ar;
    }
    if (R & 2) {
        multiply_tile<T, 2, M>(O, o_step, A, ar, ak, B, b_step, K);
        O += 2*o_step;
        A += 2*ar;
    }
    if (R & 1) multiply_tile<T, 1, M>(O, o_step, A, ar, ak, B, b_step, K);
}

// The whole product, in strips of up to four vectors
template<class T>
static void multiply(T* O, int64_t o_step, const T* A, int64_t ar, int64_t ak,
                     const T* B, int64_t b_step, int64_t R, int64_t N, int64_t K) {
    VECTORS(T);
    for (; N > 0; N -= 4*W, O += 4*W, B += 4*W) {
        if (N > 3*W) multiply_strip<T, 4>(O, o_step, A, ar, ak, B, b_step, R, K);
        else if (N > 2*W) multiply_strip<T, 3>(O, o_step, A, ar, ak, B, b_step, R, K);
        else if (N > W) multiply_strip<T, 2>(O, o_step, A, ar, ak, B, b_step, R, K);
        else multiply_strip<T, 1>(O, o_step, A, ar, ak, B, b_step, R, K);
    }
}
