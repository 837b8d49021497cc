// Causal attention on a CPU, forward and in every backward, in one pass over the scores. kernels/cpu.py calls it.
//
// As FlashAttention-2 (Dao 2023): the scores exist only as tiles of 64 × 64, which stay in the cache. All products are
// one small routine, `multiply`, that keeps 6 rows × a few vectors of the result in registers; on the diagonal it
// leaves out what the causal mask would throw away. Sums are float32 throughout, whatever the inputs.
//
// The weights are softmax's or another Kind's: a function of the score and at most one statistic of the row. Only
// `weigh` and the functions before `forward` tell the kinds apart, but for clipped softmax: it has to know a row's sum
// before it clips. Its forward keeps the exponentials of 64 queries, O(T) memory, and sums the values in a second pass.
//
// Plain C++ with the vector types of GCC and Clang. Without PyTorch's headers it compiles in seconds, and without
// intrinsics it uses whatever vectors the processor has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

namespace {

// --- vectors ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;  // 6 × 4 of the 32 registers hold a block of a product, see multiply_block
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;  // 6 × 2 of 16
#elif defined(__ARM_NEON)
constexpr int LANES = 4, VECTORS = 4;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int ROWS = 6, TILE = 64;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {  // the upper half of a float32
  uint16_t bits;
};

inline vec load(const float* x) {
  vec y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

inline void store(float* x, vec y) { std::memcpy(x, &y, sizeof y); }

inline vec load(const bfloat16* x) {
  halves upper;
  std::memcpy(&upper, x, sizeof upper);
  return (vec)(__builtin_convertvector(upper, words) << 16);
}

inline void store(bfloat16* x, vec y) {  // rounded to nearest, ties to even; a NaN stays one
  const words bits = (words)y, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const halves upper = __builtin_convertvector(y == y ? rounded : bits >> 16 | 0x40, halves);
  std::memcpy(x, &upper, sizeof upper);
}

// The first `count` elements at x, which are fewer than a vector holds; the rest is zero.
template <class Number>
inline vec load(const Number* x, int count) {
  Number some[LANES] = {};
  std::memcpy(some, x, count * sizeof *x);
  return load(some);
}

template <class Number>
inline void store(Number* x, vec y, int count) {
  Number some[LANES];
  store(some, y);
  std::memcpy(x, some, count * sizeof *x);
}

inline vec fill(float x) { return x - vec{}; }

inline ints lane_numbers() {
  ints x;
  for (int n = 0; n < LANES; ++n) x[n] = n;
  return x;
}

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// y = exp(x), and exp(x) − 1 = y_minus_1 without cancellation, for x ≤ 87. Within 2 ulp; 0 below −87; NaN stays NaN.
// x = n·log 2 + r, |r| ≤ log(2)/2, and exp(r) − 1 by its Taylor series, whose remainder is r⁸/8! < 2⁻²⁷.
inline void exponential(vec x, vec& y, vec& y_minus_1) {
  const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2²³: the last bits are now those of n
  const vec n = shifted - 12582912.0f;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log 2 in two parts, the first times n exact
  vec series = fill(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r;
  const ints power = ((ints)shifted << 23) + 0x3f800000;  // the bits of 2ⁿ
  y = (series + 1.0f) * (vec)power;
  y = x < -87.0f ? vec{} : y;
  y_minus_1 = n == 0.0f ? series : y - 1.0f;
}

inline vec exponential(vec x) {
  vec y, ignored;
  exponential(x, y, ignored);
  return y;
}

// --- products of tiles -----------------------------------------------------------------------------------------------

struct Tile {  // row-major; width is a multiple of LANES
  float* data;
  int width;
  float* operator[](int64_t row) const { return data + row * width; }
  Tile from(int64_t row) const { return {data + row * width, width}; }
};

struct Factor {  // the left factor of a product, read element by element: a tile as it stands, or transposed
  const float* data;
  int row, column;
};

inline Factor as_is(Tile x) { return {x.data, x.width, 1}; }
inline Factor transposed(Tile x) { return {x.data, 1, x.width}; }

// The part of a product C = A B that is computed, where the causal mask makes the rest zero or useless. For row m of C:
// the columns up to m, or from m on; or, of the sum for each element, the terms up to m, or from m on.
enum Region { ALL, COLUMNS_TO_ROW, COLUMNS_FROM_ROW, TERMS_TO_ROW, TERMS_FROM_ROW };

template <int M, int N>  // rows, vectors
inline void multiply_block(float* c, int c_width, Factor a, const float* b, int b_width, int k, int k_end, bool add) {
  vec sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = add ? load(c + m * c_width + n * LANES) : vec{};
#pragma GCC unroll 2
  for (; k < k_end; ++k) {
    vec row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_width + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vec factor = fill(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] += factor * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + m * c_width + n * LANES, sum[m][n]);
}

template <int M>
void multiply_rows(float* c, int c_width, Factor a, Tile b, int n, int n_end, int k, int k_end, bool add) {
  for (; n + VECTORS * LANES <= n_end; n += VECTORS * LANES)
    multiply_block<M, VECTORS>(c + n, c_width, a, b.data + n, b.width, k, k_end, add);
  for (; n + 2 * LANES <= n_end; n += 2 * LANES)  // (nothing is left for this where VECTORS is 2)
    multiply_block<M, 2>(c + n, c_width, a, b.data + n, b.width, k, k_end, add);
  for (; n < n_end; n += LANES) multiply_block<M, 1>(c + n, c_width, a, b.data + n, b.width, k, k_end, add);
}

// C = A B, or C += A B: C (rows, columns), A (rows, terms), B (terms, columns); columns a multiple of LANES.
void multiply(Tile c, Factor a, Tile b, int rows, int columns, int terms, bool add, Region region = ALL) {
  constexpr decltype(&multiply_rows<1>) by_rows[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                     multiply_rows<4>, multiply_rows<5>, multiply_rows<ROWS>};
  for (int m = 0; m < rows; m += ROWS, a.data += ROWS * a.row) {
    const int count = std::min(ROWS, rows - m);
    int n = 0, n_end = columns, k = 0, k_end = terms;
    if (region == COLUMNS_TO_ROW) n_end = std::min(columns, round_up(m + count, LANES));
    if (region == COLUMNS_FROM_ROW) n = m / LANES * LANES;
    if (region == TERMS_TO_ROW) k_end = std::min(terms, m + count);
    if (region == TERMS_FROM_ROW) k = m;
    by_rows[count - 1](c[m], c.width, a, b, n, n_end, k, k_end, add);
  }
}

// --- tiles from and to memory ----------------------------------------------------------------------------------------

struct Tensor {  // (B, H, T, D), the last dimension contiguous; strides in elements
  void* data;
  int64_t batch, head, row;
};

template <class Number>
struct Rows {  // of one head
  Number* data;
  int64_t stride;
  Rows(Tensor x, int b, int h) : data((Number*)x.data + b * x.batch + h * x.head), stride(x.row) {}
  Number* operator[](int64_t t) const { return data + t * stride; }
};

// Into the tile: rows first, first + 1, … of x, times scale, and zeros beyond D.
template <class Number>
void read(Tile tile, Rows<Number> x, int first, int rows, int D, float scale = 1) {
  const int whole = D / LANES * LANES;
  for (int t = 0; t < rows; ++t) {
    for (int d = 0; d < whole; d += LANES) store(tile[t] + d, load(x[first + t] + d) * scale);
    if (whole < D) store(tile[t] + whole, load(x[first + t] + whole, D - whole) * scale);
  }
}

template <class Number>
void write(Rows<Number> x, int first, Tile tile, int rows, int D) {
  const int whole = D / LANES * LANES;
  for (int t = 0; t < rows; ++t) {
    for (int d = 0; d < whole; d += LANES) store(x[first + t] + d, load(tile[t] + d));
    if (whole < D) store(x[first + t] + whole, load(tile[t] + whole), D - whole);
  }
}

template <int FROM, int... N>
inline vec interleave(vec a, vec b, std::integer_sequence<int, N...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (FROM + N / 2 + N % 2 * LANES)...);
#else
  return __builtin_shuffle(a, b, ints{(FROM + N / 2 + N % 2 * LANES)...});
#endif
}

// tile (width, TILE) becomes the transpose of x (TILE, width), of which `count` rows are used and the rest are zeros.
// A square of LANES rows is transposed by log₂ LANES perfect shuffles of all its elements.
void transpose(Tile tile, Tile x, int count) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  for (int d = 0; d < x.width; d += LANES)
    for (int t = 0; t < TILE; t += LANES) {
      vec square[LANES], shuffled[LANES];
#pragma GCC unroll 16
      for (int n = 0; n < LANES; ++n) square[n] = t + n < count ? load(x[t + n] + d) : vec{};
#pragma GCC unroll 16
      for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
        for (int n = 0; n < LANES / 2; ++n) {
          shuffled[2 * n] = interleave<0>(square[n], square[n + LANES / 2], lanes);
          shuffled[2 * n + 1] = interleave<LANES / 2>(square[n], square[n + LANES / 2], lanes);
        }
#pragma GCC unroll 16
        for (int n = 0; n < LANES; ++n) square[n] = shuffled[n];
      }
#pragma GCC unroll 16
      for (int n = 0; n < LANES; ++n) store(tile[d + n] + t, square[n]);
    }
}

// Memory for the tiles of one thread: allocated once, and handed out anew for each head.
class Scratch {
 public:
  Scratch(int64_t size) : memory(new float[size + 16]), end(memory.get() + size + 16) { clear(); }
  void clear() { next = memory.get() + (64 - (uintptr_t)memory.get() % 64) / sizeof(float); }  // a cache line's start
  Tile tile(int rows, int width) {
    const Tile tile{next, width};
    next += (int64_t)rows * width;
    if (next > end) std::abort();  // whoever asked for the scratch has miscounted
    return tile;
  }

 private:
  std::unique_ptr<float[]> memory;
  float *end, *next;
};

// Call task(scratch, b, h, part) for every part of every head, with a scratch of `size` floats for each thread.
template <class Task>
void share_out(int B, int H, int parts, int64_t size, int threads, Task task) {
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(size);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < (int64_t)B * H * parts; ++n) {
      scratch.clear();
      task(scratch, int(n / parts / H), int(n / parts % H), int(n % parts));
    }
  }
}

// --- weights: softmax, and what may stand in its place ---------------------------------------------------------------

enum Kind { SOFTMAX, CLIPPED, SOFTPICK, SIGMOID, RELU };  // TILES of kernels/normalizers.py, which defines them
enum Backward { FULL, DIAGONAL, STE, VALUES, DETACHED };  // VALUES: dV alone
constexpr float SOFTPICK_EPSILON = 1e-6f;

// What the weights of a kind depend on besides the scores.
struct Constants {
  Kind kind;
  float a, b;                    // clipped: alpha and the context, 0 for a row's own number of keys; sigmoid: the bias
  float of_row(int row) const {  // clipped: γ; sigmoid: the bias; relu: 1 / the number of keys that the row sees
    const float keys = row + 1;
    return kind == CLIPPED ? -a / (b > 0 ? b : keys) : kind == SIGMOID ? a : 1 / keys;
  }
};

// What is known of a row: its constant; softmax's log Σ exp(S), or softpick's log(Σ |exp(S) − 1| + ε); and delta, which
// is Σ P dP, or for clipped Σ p dP over the keys that it keeps, p being their weights in softmax.
struct Row {
  vec constant, lse, delta;
};

// From x = S and g = dL/dP to P and, except for VALUES, dS = dL/dS.
template <Kind kind, Backward backward>
inline void weigh(vec x, vec g, Row row, vec& P, vec& dS) {
  vec slope, rest;  // ∂P/∂x with the row's sum held constant; the share of it that is left where the sum changes too
  dS = g;           // STE
  if constexpr (kind == SOFTMAX || kind == CLIPPED) {
    x -= row.lse;
    x = x > 0.0f ? vec{} : x;  // the rounding of large scores may exceed the logsumexp
    vec p, p_minus_1;
    exponential(x, p, p_minus_1);
    P = slope = p, rest = -p_minus_1;
    if constexpr (kind == CLIPPED) {
      slope = p * (1.0f - row.constant);
      P = slope + row.constant;
      g = P <= 0.0f ? vec{} : g;
      P = P <= 0.0f ? vec{} : P;
    }
    if (backward == FULL) dS = slope * (g - row.delta);
  } else if constexpr (kind == SOFTPICK) {  // exp(x) − 1 = exp(x) (1 − exp(−x)), without cancellation
    vec ignored, minus_share;
    exponential(x < 0.0f ? x : -x, ignored, minus_share);
    slope = exponential(x - row.lse);
    P = x <= 0.0f ? vec{} : slope * -minus_share;
    rest = 1.0f - P;
    if (backward == FULL) dS = slope * (x > 0.0f ? g - row.delta : x < 0.0f ? row.delta : vec{});
    g = x <= 0.0f ? vec{} : g;
  } else if constexpr (kind == SIGMOID) {
    x += row.constant;
    const vec e = exponential(x < 0.0f ? x : -x), share = 1.0f / (1.0f + e);
    P = x < 0.0f ? e * share : share;
    slope = e * share * share;
  } else {
    P = x < 0.0f ? vec{} : x * row.constant;
    slope = x <= 0.0f ? vec{} : row.constant;
  }
  constexpr bool alone = kind == SIGMOID || kind == RELU;  // no sum: full, diagonal and detached are one
  if (backward == DETACHED || (alone && (backward == FULL || backward == DIAGONAL))) dS = slope * g;
  if (backward == DIAGONAL && !alone) dS = slope * rest * g;
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Of each query: its row's constant; of softmax and softpick the statistics so far.
struct Queries {
  float *constant, *top, *sum, *decay;
};

// The scores in the tile, (keys, queries), become weights exp(S − top), where `top` is the largest score of a query so
// far and `sum` the sum of its weights. Both are updated. Where a top rises, whatever was summed with the former top
// has to be multiplied by `decay`; the result is true if any did. For softpick the weights are ReLU(exp(S) − 1)
// exp(−top), the sum is that of their magnitudes without the ReLU, and `top` starts at 0.
template <Kind kind>
bool online_weights(Tile s, int keys, int queries, bool diagonal, Queries of) {
  const ints lanes = lane_numbers();
  bool risen = false;
  for (int i = 0; i < queries; i += LANES) {
    const int seen = diagonal ? std::min(keys, i + LANES) : keys;
    const vec before = load(of.top + i);
    vec now = before;
    for (int j = 0; j < seen; ++j) {
      vec x = load(s[j] + i);
      if (diagonal) store(s[j] + i, x = lanes + i >= j ? x : fill(kind == SOFTPICK ? 0 : -INF));
      now = x > now ? x : now;
    }
    const vec shift = now == -INF ? vec{} : now;
    const vec less = exponential(before - shift);
    vec total = load(of.sum + i) * less;
    for (int j = 0; j < seen; ++j) {
      const vec x = load(s[j] + i);
      if constexpr (kind == SOFTPICK) {  // |exp(x) − 1| = exp(max(x, 0)) (1 − exp(−|x|)), without cancellation
        vec ignored, minus_share;
        exponential(x < 0.0f ? x : -x, ignored, minus_share);
        const vec magnitude = exponential((x < 0.0f ? vec{} : x) - shift) * -minus_share;
        store(s[j] + i, x <= 0.0f ? vec{} : magnitude);
        total += magnitude;
      } else {
        const vec p = exponential(x - shift);
        store(s[j] + i, p);
        total += p;
      }
    }
    for (int j = seen; j < keys; ++j) store(s[j] + i, vec{});
    store(of.top + i, now), store(of.sum + i, total), store(of.decay + i, less);
    for (int n = 0; n < LANES; ++n) risen |= less[n] != 1;
  }
  return risen;
}

// The same where a weight depends on its own score alone: the scores become the weights, and nothing rises.
template <Kind kind>
bool own_weights(Tile s, int keys, int queries, bool diagonal, Queries of) {
  const ints lanes = lane_numbers();
  for (int i = 0; i < queries; i += LANES) {
    const int seen = diagonal ? std::min(keys, i + LANES) : keys;
    const Row row{load(of.constant + i), vec{}, vec{}};
    for (int j = 0; j < seen; ++j) {
      vec P, ignored;
      weigh<kind, VALUES>(load(s[j] + i), vec{}, row, P, ignored);
      if (diagonal) P = lanes + i >= j ? P : vec{};
      store(s[j] + i, P);
    }
    for (int j = seen; j < keys; ++j) store(s[j] + i, vec{});
  }
  return false;
}

// What online_weights left in a tile when the tops were `top` becomes clipped softmax's weights, now that `of` has
// those of whole rows; and `kept` becomes the weights of softmax, or 0 where they are clipped. False if all are.
bool clip(Tile s, Tile kept, int keys, int queries, const float* top, Queries of) {
  ints found{};
  for (int i = 0; i < queries; i += LANES) {
    const vec gamma = load(of.constant + i), sum = load(of.sum + i), last = load(of.top + i);
    const vec share = exponential(load(top + i) - (last == -INF ? vec{} : last)) / (sum == 0.0f ? fill(1) : sum);
    for (int j = 0; j < keys; ++j) {
      const vec p = load(s[j] + i) * share, P = p * (1.0f - gamma) + gamma;
      store(kept[j] + i, P <= 0.0f ? vec{} : p);
      store(s[j] + i, P <= 0.0f ? vec{} : P);
      found |= ~(P <= 0.0f);
    }
  }
  for (int n = 0; n < LANES; ++n)
    if (found[n]) return true;
  return false;
}

template <class Number>
void forward(Constants constants, Tensor q_, Tensor k_, Tensor v_, const float* null_logit, Tensor out, Tensor kept_out,
             float* lse, int parts, int B, int H, int H_kv, int T, int D, float scale, int threads) {
  constexpr decltype(&online_weights<SOFTMAX>) by_kind[] = {online_weights<SOFTMAX>, online_weights<SOFTMAX>,
                                                            online_weights<SOFTPICK>, own_weights<SIGMOID>,
                                                            own_weights<RELU>};
  const Kind kind = constants.kind;
  const auto weights = by_kind[kind];
  const int blocks = (T + TILE - 1) / TILE, width = round_up(D, LANES), group = H / H_kv;
  // Clipped: all scores of a block of queries stay until the sums are known, and there is a second output.
  const int strip = kind == CLIPPED ? blocks : 1, second = kind == CLIPPED ? TILE : 0;
  const int64_t size = (2 * T + 3 * TILE + second) * (int64_t)width + (strip + 4 + strip * TILE + second) * TILE;
  share_out(B, H, parts, size, threads, [=](Scratch& scratch, int b, int h, int part) {
    const Tile k = scratch.tile(T, width), v = scratch.tile(T, width), qi = scratch.tile(TILE, width);
    const Tile qt = scratch.tile(width, TILE), o = scratch.tile(TILE, width), kept_o = scratch.tile(second, width);
    const Tile scores = scratch.tile(strip * TILE, TILE), kept = scratch.tile(second, TILE);
    const Tile tops = scratch.tile(strip, TILE), statistics = scratch.tile(4, TILE);
    const Queries of{statistics[0], statistics[1], statistics[2], statistics[3]};
    read(k, Rows<const Number>(k_, b, h / group), 0, T, D);
    read(v, Rows<const Number>(v_, b, h / group), 0, T, D);
    for (int i = part; i < blocks; i += parts) {
      const int queries = std::min(TILE, T - i * TILE);
      read(qi, Rows<const Number>(q_, b, h), i * TILE, queries, D, scale);
      transpose(qt, qi, queries);
      const float top = null_logit ? null_logit[h] : kind <= CLIPPED ? -INF : 0;
      std::fill(of.top, of.top + TILE, top);
      std::fill(of.sum, of.sum + TILE, kind == SOFTPICK ? SOFTPICK_EPSILON : top > -INF ? 1 : 0);
      for (int t = 0; t < TILE; ++t) of.constant[t] = constants.of_row(i * TILE + t);
      for (int j = 0; j <= i; ++j) {
        const bool diagonal = j == i;
        const int keys = std::min(TILE, T - j * TILE);
        const Tile kj = k.from(j * TILE), vj = v.from(j * TILE), s = scores.from(kind == CLIPPED ? j * TILE : 0);
        // Keys by queries, so that a query's sum and maximum run over rows: each lane of a vector is a query.
        multiply(s, as_is(kj), qt, keys, round_up(queries, LANES), D, false, diagonal ? COLUMNS_FROM_ROW : ALL);
        const bool risen = weights(s, keys, queries, diagonal, of);
        if (kind == CLIPPED) {
          std::copy(of.top, of.top + TILE, tops[j]);
          continue;
        }
        if (j > 0 && risen)
          for (int t = 0; t < queries; ++t)
            for (int d = 0; d < width; d += LANES) store(o[t] + d, load(o[t] + d) * of.decay[t]);
        multiply(o, transposed(s), vj, queries, width, keys, j > 0, diagonal ? TERMS_TO_ROW : ALL);
      }
      if (kind == CLIPPED) {
        bool add = false;
        for (int j = 0; j <= i; ++j) {
          const int keys = std::min(TILE, T - j * TILE);
          const Tile vj = v.from(j * TILE), s = scores.from(j * TILE);
          const Region region = j == i ? TERMS_TO_ROW : ALL;
          if (!clip(s, kept, keys, queries, tops[j], of) && (add || j < i)) continue;
          multiply(o, transposed(s), vj, queries, width, keys, add, region);
          multiply(kept_o, transposed(kept), vj, queries, width, keys, add, region);
          add = true;
        }
        write(Rows<Number>(kept_out, b, h), i * TILE, kept_o, queries, D);
      }
      for (int t = 0; t < queries; ++t) {
        lse[((int64_t)b * H + h) * T + i * TILE + t] = of.top[t] + std::log(of.sum[t]);
        if (kind == CLIPPED) continue;
        const float share = of.sum[t] == 0 ? 0 : 1 / of.sum[t];  // a row of −∞ gives zeros
        for (int d = 0; d < width; d += LANES) store(o[t] + d, load(o[t] + d) * share);
      }
      write(Rows<Number>(out, b, h), i * TILE, o, queries, D);
    }
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

// Overwrites a tile of S, (queries, keys), by P and, except for VALUES, one of dP by dS. On the diagonal a row sees the
// keys up to its own. The rows are those of the head from `first` on.
template <Kind kind, Backward backward, bool diagonal>
void tile_gradient(Tile s, Tile dp, int queries, int columns, Constants constants, int first, const float* lse,
                   const float* delta) {
  const ints lanes = lane_numbers();
  constants.kind = kind;
  for (int t = 0; t < queries; ++t) {
    const int seen = diagonal ? t + 1 : columns;
    const float total = lse[first + t] == -INF ? INF : lse[first + t];  // no weight at all: a row of −∞
    const Row row{fill(kind == SOFTMAX ? 0 : constants.of_row(first + t)), fill(total), fill(delta[first + t])};
    int j = 0;
    for (; j < std::min(columns, round_up(seen, LANES)); j += LANES) {
      vec P, dS;
      weigh<kind, backward>(load(s[t] + j), backward == VALUES ? vec{} : load(dp[t] + j), row, P, dS);
      if (diagonal) P = lanes + j < seen ? P : vec{}, dS = lanes + j < seen ? dS : vec{};
      store(s[t] + j, P);
      if (backward != VALUES) store(dp[t] + j, dS);
    }
    for (; j < columns; j += LANES) {
      store(s[t] + j, vec{});
      if (backward != VALUES) store(dp[t] + j, vec{});
    }
  }
}

using TileGradient = decltype(&tile_gradient<SOFTMAX, FULL, true>);

template <Kind kind, bool diagonal>
TileGradient find_gradient(Backward backward) {
  constexpr TileGradient by_backward[] = {tile_gradient<kind, FULL, diagonal>, tile_gradient<kind, DIAGONAL, diagonal>,
                                          tile_gradient<kind, STE, diagonal>, tile_gradient<kind, VALUES, diagonal>,
                                          tile_gradient<kind, DETACHED, diagonal>};
  return by_backward[backward];
}

template <bool diagonal>
TileGradient find_gradient(Kind kind, Backward backward) {
  constexpr decltype(&find_gradient<SOFTMAX, diagonal>) by_kind[] = {
      find_gradient<SOFTMAX, diagonal>, find_gradient<CLIPPED, diagonal>, find_gradient<SOFTPICK, diagonal>,
      find_gradient<SIGMOID, diagonal>, find_gradient<RELU, diagonal>};
  return by_kind[kind](backward);
}

inline float dot(const float* x, const float* y, int width) {
  vec products{};
  for (int d = 0; d < width; d += LANES) products += load(x + d) * load(y + d);
  float sum = 0;
  for (int n = 0; n < LANES; ++n) sum += products[n];
  return sum;
}

// A task is the blocks of keys first, first + parts, … of one head of keys: their dK and dV, which are sums over the
// group of heads of queries that read them, and what they add to dQ of each of these.
template <class Number>
void backward_heads(Constants constants, Backward backward, Tensor g_, Tensor q_, Tensor k_, Tensor v_, Tensor out,
                    const float* lse, float* delta, Tensor dq_, int64_t dq_part, Tensor dk_, Tensor dv_, int parts,
                    int B, int H, int H_kv, int T, int D, float scale, int threads) {
  const TileGradient on_diagonal = find_gradient<true>(constants.kind, backward);
  const TileGradient below_diagonal = find_gradient<false>(constants.kind, backward);
  const int blocks = (T + TILE - 1) / TILE, width = round_up(D, LANES), group = H / H_kv;
  share_out(B, H, 1, 2 * width, threads, [=](Scratch& scratch, int b, int h, int) {
    const Tile gi = scratch.tile(1, width), oi = scratch.tile(1, width);
    for (int t = 0; t < T; ++t) {
      read(gi, Rows<const Number>(g_, b, h), t, 1, D);
      read(oi, Rows<const Number>(out, b, h), t, 1, D);
      delta[((int64_t)b * H + h) * T + t] = dot(gi[0], oi[0], width);
    }
  });
  // A head goes through its keys block by block. For a group the sums of all blocks stay, and its last head writes them.
  const int sums = group == 1 ? TILE : (blocks + parts - 1) / parts * TILE;
  const int64_t size = (3 * T + 4 * TILE + 2 * sums) * (int64_t)width + 2 * TILE * TILE;
  share_out(B, H_kv, parts, size, threads, [=](Scratch& scratch, int b, int h_kv, int first) {
    const Tile q = scratch.tile(T, width), g = scratch.tile(T, width), dq = scratch.tile(T, width);
    const Tile kj = scratch.tile(TILE, width), kt = scratch.tile(width, TILE);
    const Tile vj = scratch.tile(TILE, width), vt = scratch.tile(width, TILE);
    const Tile dk = scratch.tile(sums, width), dv = scratch.tile(sums, width);
    const Tile s = scratch.tile(TILE, TILE), dp = scratch.tile(TILE, TILE);
    const Rows<const Number> k(k_, b, h_kv), v(v_, b, h_kv);
    for (int member = 0; member < group; ++member) {
      const int h = h_kv * group + member;
      const int64_t head = ((int64_t)b * H + h) * T;
      read(q, Rows<const Number>(q_, b, h), 0, T, D, scale);
      read(g, Rows<const Number>(g_, b, h), 0, T, D);
      if (backward != VALUES) std::fill(dq[0], dq[std::min(first * TILE, T)], 0);
      for (int j = first, sum = 0; j < blocks; j += parts, sum += group == 1 ? 0 : TILE) {
        const int keys = std::min(TILE, T - j * TILE), columns = round_up(keys, LANES);
        const Tile dkj = dk.from(sum), dvj = dv.from(sum);
        if (backward != VALUES) {
          read(vj, v, j * TILE, keys, D);
          transpose(vt, vj, keys);
        }
        read(kj, k, j * TILE, keys, D);
        transpose(kt, kj, keys);
        read(kj, k, j * TILE, keys, D, scale);  // scaled, for dQ; in S the scale comes with q
        for (int i = j; i < blocks; ++i) {
          const bool diagonal = i == j, add = i > j || member > 0;
          const int queries = std::min(TILE, T - i * TILE);
          const Tile qi = q.from(i * TILE), gi = g.from(i * TILE);
          multiply(s, as_is(qi), kt, queries, columns, D, false, diagonal ? COLUMNS_TO_ROW : ALL);
          if (backward != VALUES)
            multiply(dp, as_is(gi), vt, queries, columns, D, false, diagonal ? COLUMNS_TO_ROW : ALL);
          const TileGradient gradient = diagonal ? on_diagonal : below_diagonal;
          gradient(s, dp, queries, columns, constants, i * TILE, lse + head, delta + head);
          multiply(dvj, transposed(s), gi, keys, width, queries, add, diagonal ? TERMS_FROM_ROW : ALL);
          if (backward == VALUES) continue;
          multiply(dkj, transposed(dp), qi, keys, width, queries, add, diagonal ? TERMS_FROM_ROW : ALL);
          multiply(dq.from(i * TILE), as_is(dp), kj, queries, width, keys, j > first, diagonal ? TERMS_TO_ROW : ALL);
        }
        if (member < group - 1) continue;
        write(Rows<Number>(dv_, b, h_kv), j * TILE, dvj, keys, D);
        if (backward != VALUES) write(Rows<Number>(dk_, b, h_kv), j * TILE, dkj, keys, D);
      }
      if (backward == VALUES) continue;
      Rows<float> own_dq(dq_, b, h);
      own_dq.data += first * dq_part;
      write(own_dq, 0, dq, T, D);
    }
  });
}

// scale·tril(a bᵀ) c, or triu if anticausal, block by block. Within a block the product is computed as it stands; what
// lies before the block (after it, if anticausal) enters through the running sum Σ b cᵀ. Either several of the H heads of
// a share one of the H_terms heads of b and c, or one is for several of these, and its result is the sum over them.
template <class Number>
void linear(bool anticausal, Tensor a_, Tensor b_, Tensor c_, Tensor out, int B, int H, int H_terms, int T, int D,
            float scale, int threads) {
  const int blocks = (T + TILE - 1) / TILE, width = round_up(D, LANES);
  const int share = std::max(1, H / H_terms), terms = std::max(1, H_terms / H);
  const int64_t size = 5 * TILE * width + TILE * TILE + width * width;
  share_out(B, H, 1, size, threads, [=](Scratch& scratch, int b, int h, int) {
    const Tile ai = scratch.tile(TILE, width), bi = scratch.tile(TILE, width), ci = scratch.tile(TILE, width);
    const Tile bt = scratch.tile(width, TILE), o = scratch.tile(TILE, width), s = scratch.tile(TILE, TILE);
    const Tile sum = scratch.tile(width, width);
    for (int n = 0; n < blocks; ++n) {
      const int i = anticausal ? blocks - 1 - n : n, rows = std::min(TILE, T - i * TILE);
      read(ai, Rows<const Number>(a_, b, h), i * TILE, rows, D);
      if (n > 0) multiply(o, as_is(ai), sum, rows, width, D, false);
      for (int term = 0; term < terms; ++term) {
        const int head = h / share * terms + term;
        const bool add = n > 0 || term > 0;
        read(bi, Rows<const Number>(b_, b, head), i * TILE, rows, D);
        read(ci, Rows<const Number>(c_, b, head), i * TILE, rows, D, scale);
        transpose(bt, bi, rows);
        multiply(s, as_is(ai), bt, rows, round_up(rows, LANES), D, false,
                 anticausal ? COLUMNS_FROM_ROW : COLUMNS_TO_ROW);
        for (int t = 0; t < rows; ++t)
          if (anticausal)
            std::fill(s[t], s[t] + t, 0);
          else
            std::fill(s[t] + t + 1, s[t] + TILE, 0);
        multiply(o, as_is(s), ci, rows, width, rows, add, anticausal ? TERMS_FROM_ROW : TERMS_TO_ROW);
        multiply(sum, transposed(bi), ci, D, width, rows, add);
      }
      write(Rows<Number>(out, b, h), i * TILE, o, rows, D);
    }
  });
}

}  // namespace

// --- what kernels/cpu.py calls ---------------------------------------------------------------------------------------

extern "C" {

// q, out and their like are (B, H, T, D), k and v (B, H_kv, T, D): head h of q reads head h / (H / H_kv) of k and v.
// Each head is divided into `parts`, by queries here and by keys in the backward, so that all threads have work.
// `kind`, a and b are the fields of Constants; a null logit is for softmax alone. `kept` is written by clipped alone:
// Σ p v over the keys that are not clipped, with the weights p of softmax.
void attention_forward(bool is_bfloat16, int kind, float a, float b, Tensor q, Tensor k, Tensor v,
                       const float* null_logit, Tensor out, Tensor kept, float* lse, int parts, int B, int H, int H_kv,
                       int T, int D, float scale, int threads) {
  constexpr decltype(&forward<float>) run[] = {forward<float>, forward<bfloat16>};
  run[is_bfloat16]({Kind(kind), a, b}, q, k, v, null_logit, out, kept, lse, parts, B, H, H_kv, T, D, scale, threads);
}

// delta (B, H, T) becomes g_i·out_i = Σ_j P_ij dP_ij; for clipped `out` is what the forward calls kept. dq (parts, B,
// H, T, D) is float32, with `dq_part` elements from one part to the next; the gradient is the sum of the parts. For
// VALUES dq and dk are not written.
void attention_backward(bool is_bfloat16, int kind, float a, float b, int backward, Tensor g, Tensor q, Tensor k,
                        Tensor v, Tensor out, const float* lse, float* delta, Tensor dq, int64_t dq_part, Tensor dk,
                        Tensor dv, int parts, int B, int H, int H_kv, int T, int D, float scale, int threads) {
  constexpr decltype(&backward_heads<float>) run[] = {backward_heads<float>, backward_heads<bfloat16>};
  run[is_bfloat16]({Kind(kind), a, b}, Backward(backward), g, q, k, v, out, lse, delta, dq, dq_part, dk, dv, parts, B,
                   H, H_kv, T, D, scale, threads);
}

// a and out (B, H, T, D), b and c (B, H_terms, T, D), where one of H and H_terms divides the other.
void linear_attention(bool is_bfloat16, bool anticausal, Tensor a, Tensor b, Tensor c, Tensor out, int B, int H,
                      int H_terms, int T, int D, float scale, int threads) {
  constexpr decltype(&linear<float>) run[] = {linear<float>, linear<bfloat16>};
  run[is_bfloat16](anticausal, a, b, c, out, B, H, H_terms, T, D, scale, threads);
}
}
