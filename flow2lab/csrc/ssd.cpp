// Mamba-2's scan in chunks, and its gradient (Dao and Gu, 2024, arXiv:2405.21060, section 6).
//
// A head has one decay per token, e_t = exp(dt_t A). Within a chunk let L_ij be the product of
// the decays after token j up to token i (1 where i = j, 0 where i < j). With c_i = L_i0 e_0 the
// decay since the chunk began and S the state (p, n) before it:
//
//     y = (C B' o L o dt) x + D x + c o (C S')          S becomes (L_last o dt o x)' B + c_last S
//
// o multiplies elementwise, and dt scales columns. The naive twin is `naive_ssd` in the notebook
// `scan`. One call takes `heads` heads of one sequence and group; a chunk goes through one head
// after the other, so that all of it stays in the cache.
//
// A row of L is the row before times one decay, plus a one on the diagonal: decays are multiplied
// up and never divided. They come in less one, since close to 1 float32 would round them to a few
// digits. A reset is a decay of 0.
//
// Tiles (p, Q) and (Q, Q) hold tokens in the lanes, (Q, N) and (p, N) states; N is n filled up to
// whole vectors.
#include "common.h"

const int64_t Q = 64;  // tokens to a chunk: `CppScan.K`

// One call's tensors, rows being tokens. Python fills this in by position, as pairs of address
// and step.
template<class T> struct Ssd {
    Rows<T> x;                   // (l, heads, p) input
    Rows<T> dt, decay_less_one;  // (l, heads)
    Rows<T> B, C;                // (l, n)
    Rows<T> D;                   // (heads), or null
    Rows<T> g;                   // (l, heads, p) gradient of the output
    Rows<T> S;                   // (heads, p, n) the first state, replaced by the last; going back
                                 // the gradient of the last, by that of the first. null: zeros, no
                                 // one asks for them
    Rows<T> kept;                // (chunks, heads, p, N) the states before each chunk, or null
    Rows<T> out;                 // (l, heads, p) output, or gradient of x; it may be g
    Rows<T> gdt, ge;             // (l, heads) gradients: of dt as a factor of x, of log decays
    Rows<T> gB, gC;              // (l, n)
    Rows<T> gD;                  // (heads), added to
    int64_t l, heads, p, n;
};

// dt (0 behind the sequence's end) and the decay since the chunk began, of m tokens; returns the
// whole chunk's decay
template<class T>
static inline T read_steps(const Ssd<T>& f, int64_t t0, int64_t m, int64_t head,
                           T* dt, T* since_start) {
    T now = 1;
    for (int64_t t = 0; t < Q; t++) {
        dt[t] = 0;
        since_start[t] = 0;
        if (t < m) {
            dt[t] = f.dt(t0 + t)[head];
            now += now*f.decay_less_one(t0 + t)[head];
            since_start[t] = now;
        }
    }
    return now;
}

// The state of every head before the first chunk (or, on the way back, its gradient behind the
// last), padded to N
template<class T>
static void read_states(const Ssd<T>& f, T* H, int64_t N) {
    std::memset(H, 0, f.heads*f.p*N*sizeof(T));
    if (f.S.at) copy_padded(H, N, f.S.at, f.n, f.heads*f.p, f.n);
}

template<class T>
static void write_states(const Ssd<T>& f, const T* H, int64_t N) {
    if (!f.S.at) return;
    for (int64_t i = 0; i < f.heads*f.p; i++) std::memcpy(f.S.at + i*f.n, H + i*N, f.n*sizeof(T));
}

// ---- forward ----------------------------------------------------------------------------------

// M (j, i) = C B' o L o dt + D on the diagonal, from G (j, i) = B C'; and until_end, what is left
// of each token's input (times dt) at the chunk's end. Rows from the last token back: row j of L'
// is row j + 1 times a decay
template<class T>
static inline void mix_tokens(const Ssd<T>& f, int64_t t0, int64_t m, int64_t head, T D,
                              const T* G, const T* dt, T* M, T* until_end) {
    VECTORS(T);
    const int64_t X = Q/W;
    V L[X] = {};
    T next = 0;
    for (int64_t t = m - 1; t >= 0; t--) {
        for (int64_t k = 0; k < X; k++) {
            const V one = unit<T>(t, k);
            L[k] += L[k]*next + one;
            store(M + t*Q + k*W, L[k]*load(G + t*Q + k*W, W)*dt[t] + D*one, W);
        }
        until_end[t] = L[(m - 1)/W][(m - 1)%W]*dt[t];
        next = f.decay_less_one(t0 + t)[head];
    }
    for (int64_t t = m; t < Q; t++) until_end[t] = 0;
}

template<class T>
static void ssd_forward(const Ssd<T>& f, T* work) {
    VECTORS(T);
    const int64_t n = f.n, p = f.p, N = (n + W - 1)/W*W;
    T* B = work;                     // (Q, N)
    T* C = B + Q*N;                  // (N, Q)
    T* G = C + Q*N;                  // (Q, Q) B C', the same for all heads
    T* M = G + Q*Q;                  // (Q, Q)
    T* x = M + Q*Q;                  // (p, Q)
    T* y = x + p*Q;                  // (p, Q)
    T* since_start = y + p*Q;        // (Q)
    T* until_end = since_start + Q;  // (Q)
    T* dt = until_end + Q;           // (Q)
    T* H = dt + Q;                   // (heads, p, N) the states
    read_states(f, H, N);
    for (int64_t t0 = 0; t0 < f.l; t0 += Q) {
        const int64_t m = f.l - t0 < Q ? f.l - t0 : Q;
        copy_padded(B, N, f.B(t0), f.B.step, m, n);
        transpose(C, Q, f.C(t0), f.C.step, m, n, true);
        std::memset(G, 0, Q*Q*sizeof(T));
        multiply(G, Q, B, N, 1, C, Q, m, m, n);
        for (int64_t j = 0; j < f.heads; j++) {
            T* S = H + j*p*N;
            const T D = f.D.at ? f.D.at[j] : 0;
            const T whole = read_steps(f, t0, m, j, dt, since_start);
            if (j + 1 < f.heads) prefetch_tile(f.x(t0) + (j + 1)*p, f.x.step, m, p);
            transpose(x, Q, f.x(t0) + j*p, f.x.step, m, p, true);
            mix_tokens(f, t0, m, j, D, G, dt, M, until_end);
            // y = c o (S C') + x M, without the blocks of M below its diagonal
            std::memset(y, 0, p*Q*sizeof(T));
            if (!all_zero(S, p*N)) multiply(y, Q, S, N, 1, C, Q, p, m, n);
            for (int64_t i = 0; i < p*Q; i += W)
                store(y + i, load(y + i, W)*load(since_start + i%Q, W), W);
            for (int64_t k = 0; k < m; k += W)
                multiply(y + k, Q, x + k, Q, 1, M + k*(Q + 1), Q,
                         p, m - k, m - k < W ? m - k : W);
            transpose(f.out(t0) + j*p, f.out.step, y, Q, p, m, false);
            // S becomes whole S + (until_end o x) B
            for (int64_t i = 0; i < p*Q; i += W)
                store(x + i, load(x + i, W)*load(until_end + i%Q, W), W);
            for (int64_t i = 0; i < p*N; i += W) {
                const V s = load(S + i, W);
                store(S + i, s*whole, W);
                if (f.kept.at) store(f.kept(t0/Q) + j*p*N + i, s, W);
            }
            if (f.S.at || t0 + Q < f.l) multiply(S, N, x, Q, 1, B, N, p, N, m);
        }
    }
    write_states(f, H, N);
}

// ---- backward ---------------------------------------------------------------------------------
// Chunks from the end. q is the gradient of the state behind the chunk, S the state before it, E
// = g x' (i, j).

// The tiles of a call, one behind the other in its work space
template<class T> struct BackTiles {
    T *B, *C, *BT;                             // (Q, N), (Q, N), (N, Q)
    T *old_grad;                               // (Q, N) gradient of C from the state before
    T *gB, *gC;                                // (Q, N) sums over the heads
    T *G, *gG;                                 // (Q, Q) C B' (i, j); its gradient, over all heads
    T *M, *E;                                  // (Q, Q)
    T *x, *g, *x_to_end, *g_since_start, *gx;  // (p, Q)
    T *since_start, *dt, *old, *in;            // (Q)
    T *H;                                      // (heads, p, N) gradients of the states
    BackTiles(T* work, int64_t N, int64_t p) {
        B = work;
        C = B + Q*N;
        BT = C + Q*N;
        old_grad = BT + Q*N;
        gB = old_grad + Q*N;
        gC = gB + Q*N;
        G = gC + Q*N;
        gG = G + Q*Q;
        M = gG + Q*Q;
        E = M + Q*Q;
        x = E + Q*Q;
        g = x + p*Q;
        x_to_end = g + p*Q;
        g_since_start = x_to_end + p*Q;
        gx = g_since_start + p*Q;
        since_start = gx + p*Q;
        dt = since_start + Q;
        old = dt + Q;
        in = old + Q;
        H = in + Q;
    }
};

// Row by row of L (i, j): the gradient of G, M as on the way there, E o L o G o dt (what each
// pair of tokens gives the decays between them), and in `by_column` its sums over i without dt. L
// comes out as its last row
template<class T>
static inline void unmix_tokens(const Ssd<T>& f, const BackTiles<T>& w,
                                int64_t t0, int64_t m, int64_t head, T D,
                                typename VectorOf<T>::V* L, typename VectorOf<T>::V* by_column) {
    VECTORS(T);
    T gD = 0;
    for (int64_t t = 0; t < m; t++) {
        gD += w.E[t*Q + t];
        for (int64_t k = 0; k < Q/W; k++) {
            const int64_t i = t*Q + k*W;
            const V one = unit<T>(t, k), d = load(w.dt + k*W, W), c = load(w.G + i, W);
            L[k] += L[k]*f.decay_less_one(t0 + t)[head] + one;
            const V u = load(w.E + i, W)*L[k], z = u*c;
            by_column[k] += z;
            store(w.gG + i, load(w.gG + i, W) + u*d, W);
            store(w.E + i, z*d, W);
            store(w.M + i, c*L[k]*d + D*one, W);
        }
    }
    if (f.gD.at) f.gD.at[head] += gD;
}

// From gx = q B' (p, Q): what the state behind the chunk gives the gradients of x and dt, with
// `L` the decays from each token to the chunk's end. `in` is what each token gives the decays
// behind it
template<class T>
static inline void back_from_state(const Ssd<T>& f, const BackTiles<T>& w,
                                   int64_t t0, int64_t m, int64_t head,
                                   const typename VectorOf<T>::V* L,
                                   const typename VectorOf<T>::V* by_column) {
    VECTORS(T);
    for (int64_t k = 0; k < Q/W; k++) {
        const V d = load(w.dt + k*W, W), c = load(w.since_start + k*W, W);
        V v = {};
        for (int64_t i = k*W; i < f.p*Q; i += Q) {
            const V o = load(w.gx + i, W)*L[k], xi = load(w.x + i, W);
            v += xi*o;
            store(w.gx + i, o*d, W);
            store(w.x_to_end + i, xi*L[k]*d, W);
            store(w.g_since_start + i, load(w.g + i, W)*c, W);
        }
        for (int64_t t = k*W; t < m && t < k*W + W; t++)
            f.gdt(t0 + t)[head] = by_column[k][t%W] + v[t%W];
        store(w.in + k*W, v*d, W);
    }
}

// ge_t, the gradient of a log decay: all that reaches from before token t to it or behind it.
// `behind` is what goes from the state before the chunk to the state behind it
template<class T>
static inline void back_to_decays(const Ssd<T>& f, const BackTiles<T>& w,
                                  int64_t t0, int64_t m, int64_t head, T behind, T* sums) {
    VECTORS(T);
    const int64_t X = Q/W;
    T before = 0;
    for (int64_t t = 0; t < m; t++) {  // from earlier tokens to the state behind
        f.ge(t0 + t)[head] = before;
        before += w.in[t];
    }
    V z[X] = {};
    for (int64_t t = m - 1; t >= 0; t--) {  // from the state before to later tokens
        V s = {};
        for (int64_t k = 0; k < X; k++) {
            z[k] = (z[k] + load(w.E + t*Q + k*W, W))*(1 - unit<T>(t, k));
            s += z[k];
        }
        store(sums + t*W, s, W);
        behind += w.old[t];
        f.ge(t0 + t)[head] += behind;
    }
    sums_of<T, Q>(w.old, sums);  // between two tokens of the chunk
    for (int64_t t = 0; t < m; t++) f.ge(t0 + t)[head] += w.old[t];
}

template<class T>
static void ssd_backward(const Ssd<T>& f, T* work) {
    VECTORS(T);
    const int64_t n = f.n, p = f.p, N = (n + W - 1)/W*W, X = Q/W;
    const BackTiles<T> w(work, N, p);
    read_states(f, w.H, N);
    for (int64_t t0 = (f.l - 1)/Q*Q; t0 >= 0; t0 -= Q) {
        const int64_t m = f.l - t0 < Q ? f.l - t0 : Q;
        copy_padded(w.B, N, f.B(t0), f.B.step, m, n);
        copy_padded(w.C, N, f.C(t0), f.C.step, m, n);
        transpose(w.BT, Q, f.B(t0), f.B.step, m, n, true);
        std::memset(w.gB, 0, 2*Q*(N + Q)*sizeof(T));  // gB, gC, G and gG in one
        multiply(w.G, Q, w.C, N, 1, w.BT, Q, m, m, n);
        for (int64_t j = 0; j < f.heads; j++) {
            T *q = w.H + j*p*N, *S = f.kept(t0/Q) + j*p*N;
            const T D = f.D.at ? f.D.at[j] : 0;
            const T whole = read_steps(f, t0, m, j, w.dt, w.since_start);
            prefetch_tile(S, N, p, N);
            if (j + 1 < f.heads) {
                prefetch_tile(f.x(t0) + (j + 1)*p, f.x.step, m, p);
                prefetch_tile(f.g(t0) + (j + 1)*p, f.g.step, m, p);
            }
            transpose(w.x, Q, f.x(t0) + j*p, f.x.step, m, p, true);
            transpose(w.g, Q, f.g(t0) + j*p, f.g.step, m, p, true);
            std::memset(w.E, 0, Q*Q*sizeof(T));  // without the blocks above the diagonal
            for (int64_t k = 0; k < m; k += W)
                multiply(w.E + k*Q, Q, w.g + k, 1, Q, w.x, Q, m - k < W ? m - k : W, k + W, p);
            V L[X] = {}, by_column[X] = {};
            unmix_tokens(f, w, t0, m, j, D, L, by_column);
            const bool first = all_zero(S, p*N), last = all_zero(q, p*N);  // parts of zero
            // gx = q B' o L_last o dt + g M
            std::memset(w.gx, 0, p*Q*sizeof(T));
            if (!last) multiply(w.gx, Q, q, N, 1, w.BT, Q, p, m, n);
            back_from_state(f, w, t0, m, j, L, by_column);
            for (int64_t k = 0; k < m; k += W)
                multiply(w.gx, Q, w.g + k, Q, 1, w.M + k*Q, Q, p, k + W, m - k < W ? m - k : W);
            transpose(f.out(t0) + j*p, f.out.step, w.gx, Q, p, m, false);
            // gB += (x o L_last o dt)' q, gC += (g o c)' S; sums: each token's share of the state
            // before
            T sums[Q*W] = {};
            std::memset(w.old_grad, 0, Q*N*sizeof(T));
            if (!last) multiply(w.gB, N, w.x_to_end, 1, Q, q, N, m, N, p);
            if (!first) multiply(w.old_grad, N, w.g_since_start, 1, Q, S, N, m, N, p);
            for (int64_t t = 0; t < m && !first; t++) {
                V v = {};
                for (int64_t i = t*N; i < t*N + N; i += W) {
                    const V o = load(w.old_grad + i, W);
                    v += o*load(w.C + i, W);
                    store(w.gC + i, load(w.gC + i, W) + o, W);
                }
                store(sums + t*W, v, W);
            }
            sums_of<T, Q>(w.old, sums);
            // q becomes the gradient of the state before: whole q + (g o c) C
            V v = {};
            for (int64_t i = 0; i < p*N; i += W) {
                const V h = load(q + i, W);
                v += h*load(S + i, W);
                store(q + i, h*whole, W);
            }
            if (f.S.at || t0) multiply(q, N, w.g_since_start, Q, 1, w.C, N, p, N, m);
            back_to_decays(f, w, t0, m, j, sum_of<T>(v)*whole, sums);
        }
        multiply(w.gC, N, w.gG, Q, 1, w.B, N, m, N, m);
        multiply(w.gB, N, w.gG, 1, Q, w.C, N, m, N, m);
        for (int64_t t = 0; t < m; t++) {
            std::memcpy(f.gB(t0 + t), w.gB + t*N, n*sizeof(T));
            std::memcpy(f.gC(t0 + t), w.gC + t*N, n*sizeof(T));
        }
    }
    write_states(f, w.H, N);
}

#define EXPORT_SSD(T, S)                                                                 \
    extern "C" void ssd_forward_##S(const Ssd<T>* f, T* work) { ssd_forward(*f, work); } \
    extern "C" void ssd_backward_##S(const Ssd<T>* f, T* work) { ssd_backward(*f, work); }
EXPORT_SSD(float, f32)
EXPORT_SSD(double, f64)
