// What a GPU computes in one launch, each kernel under the equation that it is held to (tests/test_cuda.py). kernels/cuda.py starts them.
//
// A kernel is a function that many threads run at once. A thread knows its number in its block (threadIdx.x), and its block's number
// (blockIdx.x); a block has 256 threads here. Under "a thread an element", the thread of number i computes element i. Under "a warp a
// row", the 32 threads of a warp share a row: thread `lane` takes the elements lane, lane + 32, ..., and `total` adds what the 32 found.
//
// The compiler is told not to fuse a * b + c (--fmad=false): every operation is rounded by itself, as NumPy's are. Where bitsandbytes fuses
// one, it says fmaf. Quotients and roots are rounded correctly, unless an instruction is named.

#ifndef ON_HOST  // the GPU's own instructions; the tests put C++ in their place
#if __CUDA_ARCH__ >= 800
__device__ unsigned short to_bf16(float x) { unsigned short y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else  // dtypes.bfloat16_bits
__device__ unsigned short to_bf16(float x)
{ unsigned int u = __float_as_uint(x); return x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16; }
#endif
__device__ unsigned short to_f16(float x) { unsigned short y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
__device__ float from_bf16(unsigned short x) { return __uint_as_float((unsigned int)x << 16); }
__device__ float from_f16(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#endif
// How a number is read and written: as 4 bytes, or as the 2 of a bfloat16 or a float16.
typedef unsigned short half_t;
#define NUMBER(name, T, from, to) \
    struct name { typedef T type; static __device__ float get(T x) { return from(x); } static __device__ T put(float x) { return to(x); } };
NUMBER(F32, float, , )
NUMBER(BF16, half_t, from_bf16, to_bf16)
NUMBER(F16, half_t, from_f16, to_f16)
template <class T> using V = typename T::type;
#define FOR_ALL(KERNELS) KERNELS(float32, F32) KERNELS(bfloat16, BF16) KERNELS(float16, F16)
__device__ float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
__device__ float total(float x) { for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i); return x; }
__device__ float top(float x) { for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i)); return x; }
#define KERNEL extern "C" __global__ void
#define INF __int_as_float(0x7f800000)
#define NO_NUMBER __int_as_float(0x7fc00000)  // NaN
#define ELEMENT(n) long long i = blockIdx.x * 256LL + threadIdx.x; if (i >= n) return;
#define ROW(n) long long row = blockIdx.x * 8LL + threadIdx.x / 32; int lane = threadIdx.x % 32; if (row >= n) return;

// -------------------------------------------------------------------------------------------- 4 bits; each thread writes 16 bytes
// w_i = code[q_i] m_b,   m_b = d[k_b] n_(b/256) + mu                                              QLoRA eq. 6; quant.dequantize, restore
#define STORED const unsigned int* packed, const float* absmax, const unsigned char* k, const float* n, const float* d, float mu, \
    const float* code, unsigned int words, int per_block, int nested, int ftz
template <class T> __device__ void dequantize(V<T>* w, STORED) {
    const int EACH = 16 / sizeof(V<T>); struct alignas(16) Some { V<T> w[EACH]; };    // a thread's weights: 8, or 4 in float32
    __shared__ float c[16], d_[256];
    if (threadIdx.x < 16) c[threadIdx.x] = code[threadIdx.x];
    if (nested) d_[threadIdx.x] = d[threadIdx.x];
    __syncthreads();
    for (unsigned int i = blockIdx.x * 256 + threadIdx.x; i < words; i += gridDim.x * 256) {
        unsigned int b = i >> per_block;                                              // the block that they are in, and their indices
        unsigned int q = EACH == 8 ? packed[i] : ((const unsigned short*)packed)[i];
        float m = nested ? d_[k[b]] * n[b >> 8] + mu : absmax[b];
        Some out;
        for (int j = 0; j < EACH; j++) {                                              // the even weight lies in a byte's high half
            float x = c[q >> (4 * (j ^ 1)) & 15] * m;
            out.w[j] = T::put(ftz ? flush(x) : x);
        }
        ((Some*)w)[i] = out;
    }
}
#define DEQUANTIZE(name, T) KERNEL dequantize_##name(T::type* w, STORED) \
    { dequantize<T>(w, packed, absmax, k, n, d, mu, code, words, per_block, nested, ftz); }
FOR_ALL(DEQUANTIZE)
// m_b = max |w_i|,   q_i = #{bounds below w_i / m_b}, two in a byte: a warp a block of weights       kernels.rounding, both rules
KERNEL quantize(const float* w, unsigned char* packed, float* absmax, const float* bounds, const unsigned char* order, int last, int size,
    int gpu, long long blocks) {
    __shared__ float bound[15];
    if (threadIdx.x < 15) bound[threadIdx.x] = bounds[threadIdx.x];                   // those that a short code lacks are infinite
    __syncthreads();
    ROW(blocks)
    const float* x = w + row * size;
    unsigned int most = 0, seen = 0;                                                  // as patterns without their sign, NaN is above all
    for (int i = lane; i < size; i += 32) {
        unsigned int u = __float_as_uint(x[i]) & 0x7fffffffu;
        if (!gpu || u <= 0x7f800000u) { most = max(most, u); seen = 1; }              // the GPU's rule passes NaN over
    }
    for (int i = 16; i > 0; i /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, i)), seen |= __shfl_xor_sync(0xffffffffu, seen, i);
    float m = __uint_as_float(most);
    if (gpu) m = seen ? flush(m) : -3.402823466e38f;
    float s = gpu ? rcp_approx(m) : 1.0f / (m < 1e-38f ? 1e-38f : m);
    if (lane == 0) absmax[row] = m;
    for (int i = 2 * lane; i < size; i += 64) {
        unsigned char q[2];
        for (int j = 0; j < 2; j++) {
            float y = gpu ? flush(flush(x[i + j]) * s) : x[i + j] * s;
            int found = 0;                                                            // the bounds ascend: halve them four times
            for (int step = 8; step > 0; step /= 2) found += y > bound[found + step - 1] ? step : 0;
            q[j] = order[!gpu && isnan(y) ? last : found];
        }
        packed[(row * size + i) / 2] = q[0] << 4 | q[1];
    }
}

// ------------------------------------------------------------------------------------------------------------------ a warp a row
// y = w x rho,   rho = 1 / sqrt(mean(x^2) + eps)                                                                        ops.rms_norm
KERNEL rms_norm(const float* x, const float* w, float* y, float* rho, float eps, int d, long long rows) {
    ROW(rows) x += row * d; y += row * d;
    float s = 0;
    for (int i = lane; i < d; i += 32) s += x[i] * x[i];
    float r = 1.0f / sqrtf(total(s) / (float)d + eps);
    for (int i = lane; i < d; i += 32) y[i] = x[i] * r * w[i];
    if (lane == 0) rho[row] = r;
}
// gx = rho (h - xh mean(h xh)),   h = g w,   xh = x rho
KERNEL rms_norm_back(const float* x, const float* w, const float* rho, const float* g, float* gx, int d, long long rows) {
    ROW(rows) x += row * d; g += row * d; gx += row * d;
    float r = rho[row], s = 0;
    for (int i = lane; i < d; i += 32) s += (g[i] * w[i]) * (x[i] * r);
    float mean = total(s) / (float)d;
    for (int i = lane; i < d; i += 32) gx[i] = (g[i] * w[i] - x[i] * r * mean) * r;
}
// L_i = m_i (log sum exp(z_i - top) - (z_it - top)),   kept: top and the sum                              ops.softmax_cross_entropy
KERNEL cross_entropy(const float* z, const long long* target, const float* weight, float* loss, float* kept, int n, long long rows) {
    ROW(rows) z += row * n;
    float m = -INF, s = 0;
    for (int i = lane; i < n; i += 32) m = fmaxf(m, z[i]);
    m = top(m);
    for (int i = lane; i < n; i += 32) s += expf(z[i] - m);
    s = total(s); long long t = target[row];
    if (lane == 0) {
        loss[row] = t < 0 || t >= n ? NO_NUMBER : weight[row] * (logf(s) - (z[t] - m));     // a device has no other way to say it
        kept[2 * row] = m; kept[2 * row + 1] = s;
    }
}
// gz_ij = g m_i (softmax(z_i)_j - [j = t_i])
KERNEL cross_entropy_back(const float* z, const long long* target, const float* weight, const float* kept, const float* g, float* gz, int n,
    long long rows) {
    ROW(rows) z += row * n; gz += row * n;
    float m = kept[2 * row], s = kept[2 * row + 1], gw = g[0] * weight[row];
    for (int i = lane; i < n; i += 32) gz[i] = expf(z[i] - m) / s * gw - (i == target[row] ? gw : 0.0f);
}
// p_ij = exp(s_ij - top) / sum where query i sees key j, else 0: i of t queries sees the keys up to n - t + i, `window` at the most
template <class T> __device__ void attend(V<T>* s, int t, int n, int window, long long rows) {
    ROW(rows) s += row * n;
    int end = n - t + (int)(row % t) + 1, begin = window > 0 && end > window ? end - window : 0;
    float m = -INF, sum = 0;
    for (int j = begin + lane; j < end; j += 32) m = fmaxf(m, T::get(s[j]));
    m = top(m);
    for (int j = begin + lane; j < end; j += 32) sum += expf(T::get(s[j]) - m);
    sum = total(sum);
    for (int j = lane; j < n; j += 32) s[j] = T::put(j < begin || j >= end ? 0.0f : expf(T::get(s[j]) - m) / sum);
}
// gs = p (gp - sum gp p) scale, in gp's place
template <class T> __device__ void attend_back(const V<T>* __restrict__ p, V<T>* __restrict__ gp, float scale, int t, int n, long long rows)
{   ROW(rows) p += row * n; gp += row * n;
    float s = 0;
    int end = n - t + (int)(row % t) + 1;                                             // beyond, p is 0
    #pragma unroll 8
    for (int j = lane; j < end; j += 32) s += T::get(gp[j]) * T::get(p[j]);
    s = total(s);
    #pragma unroll 8
    for (int j = lane; j < n; j += 32) gp[j] = T::put(j < end ? (T::get(gp[j]) - s) * T::get(p[j]) * scale : 0.0f);
}
#define ATTEND(name, T) \
    KERNEL attend_##name(T::type* s, int t, int n, int window, long long rows) { attend<T>(s, t, n, window, rows); } \
    KERNEL attend_back_##name(const T::type* p, T::type* gp, float scale, int t, int n, long long rows) \
    { attend_back<T>(p, gp, scale, t, n, rows); }
FOR_ALL(ATTEND)

// ----------------------------------------------------------------------------------------------------------- a thread four numbers
template <class T> struct alignas(4 * sizeof(T)) Four { T x[4]; };
// where the four of number i of (batch, a, b, d) lie in (batch, b, a, d), d being counted in fours; in their own place if a is 0
__device__ unsigned int swapped(unsigned int i, unsigned int a, unsigned int b, unsigned int d) {
    return a ? ((i / d / b / a * b + i / d % b) * a + i / d / b % a) * d + i % d : i;
}
#define FOURS int two, int a, int b, int d, long long n
// y = round(x),   z = round(s x) if two are asked for                                                                  products.held
template <class T> __device__ void rounded(const float* x, float s, V<T>* y, V<T>* z, FOURS) {
    ELEMENT(n)
    Four<V<T>> v, w; Four<float> u = ((const Four<float>*)x)[i];
    for (int j = 0; j < 4; j++) { v.x[j] = T::put(u.x[j]); w.x[j] = T::put(u.x[j] * s); }
    ((Four<V<T>>*)y)[swapped(i, a, b, d)] = v;
    if (two) ((Four<V<T>>*)z)[swapped(i, a, b, d)] = w;
}
// z = x + s y, or z = x if one is asked for, in float32                                               products.widened, adapters.fused
template <class T> __device__ void sum(const V<T>* x, const V<T>* y, float s, float* z, FOURS) {
    ELEMENT(n)
    Four<V<T>> u = ((const Four<V<T>>*)x)[i], v = two ? ((const Four<V<T>>*)y)[i] : u;
    Four<float> w; for (int j = 0; j < 4; j++) w.x[j] = two ? T::get(u.x[j]) + T::get(v.x[j]) * s : T::get(u.x[j]);
    ((Four<float>*)z)[swapped(i, a, b, d)] = w;
}
#define ROUND(name, T) \
    KERNEL round_##name(const float* x, float s, T::type* y, T::type* z, FOURS) { rounded<T>(x, s, y, z, two, a, b, d, n); } \
    KERNEL sum_##name(const T::type* x, const T::type* y, float s, float* z, FOURS) { sum<T>(x, y, s, z, two, a, b, d, n); }
FOR_ALL(ROUND)

// ------------------------------------------------------------------------------------------------------------- a thread an element
// (a, b) -> (a cos - b sin, b cos + a sin), the pairs being the halves of a head; sign -1 turns back                          ops.rope
KERNEL rope(const float* x, const float* cos, const float* sin, float* y, float sign, int t, int heads, int half, long long pairs) {
    ELEMENT(pairs)
    long long row = i / half; int j = i % half, place = (row / heads) % t;            // row: of (batch, position, head)
    float c = cos[place * half + j], s = sign * sin[place * half + j], a = x[row * 2 * half + j], b = x[row * 2 * half + half + j];
    y[row * 2 * half + j] = a * c - b * s;
    y[row * 2 * half + half + j] = b * c + a * s;
}
// y = a s b,   s = (1 + tanh(a/2)) / 2                                                                                   ops.swiglu
KERNEL swiglu(const float* a, const float* b, float* y, long long n) {
    ELEMENT(n)
    float s = tanhf(a[i] * 0.5f) * 0.5f + 0.5f;
    y[i] = a[i] * s * b[i];
}
// ga = g b (s + a s (1 - s)),   gb = g a s
KERNEL swiglu_back(const float* a, const float* b, const float* g, float* ga, float* gb, long long n) {
    ELEMENT(n)
    float s = tanhf(a[i] * 0.5f) * 0.5f + 0.5f, y = a[i] * s;
    ga[i] = ((1.0f - s) * y + s) * (g[i] * b[i]);
    gb[i] = g[i] * y;
}
// m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p = decay p - rate m / (sqrt(v) root + eps)                    optim.adamw_step
KERNEL adamw(float* p, const float* g, float* m, float* v, float b1, float b1_, float b2, float b2_, float root, float eps, float rate,
    float decay, long long n) {
    ELEMENT(n)
    float x = m[i] = m[i] * b1 + g[i] * b1_;
    float y = v[i] = v[i] * b2 + g[i] * g[i] * b2_;
    float step = x / (sqrtf(y) * root + eps) * rate;
    p[i] = p[i] * decay - step;
}

// ------------------------------------------------------------------------------------------- AdamW in 8 bits: a block of threads a block
__device__ float largest(float x, float* of_warps) {                                  // over the 256 threads; NaN does not count
    if (x = top(x); threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[0];
    for (int i = 1; i < 8; i++) x = fmaxf(x, of_warps[i]);
    __syncthreads();
    return x;
}
__device__ unsigned char nearest(float x, float absmax, const unsigned char* table) { // kernels.rounding.cpu_quantize_8bit
    float s = x * (1.0f / absmax);
    float u = isnan(s) ? 0.0f : (fminf(fmaxf(s, -1.0f), 1.0f) + 1.0f) * 0.5f;
    return table[(int)(float)(u * 65535.0 + 0.5)];
}
// m = map1[k] absmax,   m = fma(g, 1 - b1, b1 m),   k, absmax = Q1(m), v likewise       training.adamw8bit, rule "bitsandbytes-cpu"
KERNEL adamw8bit(float* p, const float* g, unsigned char* km, unsigned char* kv, float* am, float* av, const float* map1, const float* map2,
    const unsigned char* table1, const unsigned char* table2, float b1, float b1_, float b2, float b2_, float root, float eps, float rate,
    float decay, long long n) {
    __shared__ float of_warps[8];
    long long i = blockIdx.x * 256LL + threadIdx.x;
    bool in = i < n; float m = 0, v = 0, x = in ? g[i] : 0.0f;
    if (in) {
        m = fmaf(x, b1_, map1[km[i]] * am[blockIdx.x] * b1);
        v = fmaf(x * b2_, x, map2[kv[i]] * av[blockIdx.x] * b2);
    }
    float tm = largest(fmaxf(0.0f, fabsf(m)), of_warps), tv = largest(fmaxf(0.0f, fabsf(v)), of_warps);
    if (threadIdx.x == 0) { am[blockIdx.x] = tm; av[blockIdx.x] = tv; }
    if (!in) return;
    km[i] = nearest(m, tm, table1); kv[i] = nearest(v, tv, table2);
    p[i] = p[i] * decay + m * rate / (sqrtf(v) / root + eps);
}
