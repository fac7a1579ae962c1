// SPDX-License-Identifier: MIT
// Vectors of floats in three widths, one namespace per instruction set, for kernels that loops
// cannot express: register tiles, transposes and masked ends. A kernel file is compiled once per
// instruction set between LMTFAST_TARGET_BEGIN_... and LMTFAST_TARGET_END, so that everything in
// it, lambdas and templates included, may use that set.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dispatch.h"
#include "core/vector_math.h"

#if LMTFAST_X86_CLONES
#include <immintrin.h>
#endif

#define LMTFAST_AVX2 "avx2,fma"
#define LMTFAST_AVX512 "avx512f,avx512vl,avx512dq,avx2,fma"
#if defined(__clang__)
#define LMTFAST_TARGET_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define LMTFAST_TARGET_BEGIN_AVX512                                                            \
  _Pragma(                                                                                     \
      "clang attribute push(__attribute__((target(\"avx512f,avx512vl,avx512dq,avx2,fma\"))), " \
      "apply_to = function)")
#define LMTFAST_TARGET_END _Pragma("clang attribute pop")
#else
#define LMTFAST_TARGET_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define LMTFAST_TARGET_BEGIN_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512vl,avx512dq,avx2,fma\")")
#define LMTFAST_TARGET_END _Pragma("GCC pop_options")
#endif

// Asks for a cache line before it is needed; any address will do.
#if defined(__GNUC__) || defined(__clang__)
#define LMTFAST_FETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define LMTFAST_FETCH(address) static_cast<void>(address)
#endif

namespace lmtfast::simd {

// A bfloat16 is the upper half of a float.
inline float widen_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounded to the nearest even. A NaN whose mantissa is cut off must not become an infinity.
inline uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
  return static_cast<uint16_t>(rounded >> 16);
}

// One float at a time: compilers without vector types, and the definition of what the others do.
namespace scalar {

constexpr int kWidth = 1;
using Vec = float;
// Rows of a register tile of two vectors: what the registers hold beside two operands.
constexpr int kTileRows = 4;

LMTFAST_INLINE Vec zero() { return 0.0f; }
LMTFAST_INLINE Vec broadcast(float x) { return x; }
LMTFAST_INLINE Vec load(const float* p) { return *p; }
LMTFAST_INLINE Vec load(const uint16_t* p) { return widen_bfloat16(*p); }
// The first n < kWidth entries; the others are zero, and neither read nor written.
LMTFAST_INLINE Vec load_part(const float*, int64_t) { return 0.0f; }
LMTFAST_INLINE Vec load_part(const uint16_t*, int64_t) { return 0.0f; }
// Lanes from `lane` on are those of p, the ones below those of v.
LMTFAST_INLINE Vec load_from(Vec v, int64_t lane, const float* p) { return lane > 0 ? v : *p; }
LMTFAST_INLINE void store(float* p, Vec v) { *p = v; }
LMTFAST_INLINE void store_part(float*, Vec, int64_t) {}
LMTFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// (kWidth, kWidth) from rows of stride `from` to rows of stride `to`.
LMTFAST_INLINE void transpose(const float* source, int64_t, float* target, int64_t) {
  *target = *source;
}

}  // namespace scalar

#if defined(__GNUC__) || defined(__clang__)
// Four floats in the compiler's own vector type: SSE2, NEON and the like.
namespace baseline {

constexpr int kWidth = 4;
constexpr int kTileRows = 6;
typedef float Vec __attribute__((vector_size(16)));

LMTFAST_INLINE Vec zero() { return Vec{}; }
LMTFAST_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
LMTFAST_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LMTFAST_INLINE Vec load(const uint16_t* p) {
  return Vec{widen_bfloat16(p[0]), widen_bfloat16(p[1]), widen_bfloat16(p[2]),
             widen_bfloat16(p[3])};
}
LMTFAST_INLINE Vec load_part(const float* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LMTFAST_INLINE Vec load_part(const uint16_t* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = widen_bfloat16(p[i]);
  return v;
}
LMTFAST_INLINE Vec load_from(Vec v, int64_t lane, const float* p) {
  for (int64_t i = lane; i < kWidth; ++i) v[i] = p[i];
  return v;
}
LMTFAST_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
LMTFAST_INLINE void store_part(float* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
LMTFAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  Vec d;
  for (int i = 0; i < kWidth; ++i) d[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return d;
#else
  return a * b + c;
#endif
}
LMTFAST_INLINE void transpose(const float* source, int64_t from, float* target, int64_t to) {
  for (int i = 0; i < kWidth; ++i) {
    store(target + i * to,
          Vec{source[i], source[from + i], source[2 * from + i], source[3 * from + i]});
  }
}

}  // namespace baseline
#else
namespace baseline = scalar;
#endif

#if LMTFAST_X86_CLONES
LMTFAST_TARGET_BEGIN_AVX2
namespace avx2 {

constexpr int kWidth = 8;
constexpr int kTileRows = 6;
using Vec = __m256;

LMTFAST_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LMTFAST_INLINE Vec zero() { return _mm256_setzero_ps(); }
LMTFAST_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
LMTFAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
LMTFAST_INLINE Vec load(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LMTFAST_INLINE Vec load_part(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
LMTFAST_INLINE Vec load_part(const uint16_t* p, int64_t n) {
  uint16_t half[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) half[i] = p[i];
  return load(half);
}
LMTFAST_INLINE Vec load_from(Vec v, int64_t lane, const float* p) {
  return _mm256_blendv_ps(load(p), v, _mm256_castsi256_ps(first(lane)));
}
LMTFAST_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
LMTFAST_INLINE void store_part(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }
LMTFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LMTFAST_INLINE void transpose(const float* source, int64_t from, float* target, int64_t to) {
  Vec r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = load(source + i * from);
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    store(target + i * to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store(target + (i + 4) * to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

}  // namespace avx2
LMTFAST_TARGET_END

LMTFAST_TARGET_BEGIN_AVX512
namespace avx512 {

constexpr int kWidth = 16;
constexpr int kTileRows = 14;
using Vec = __m512;

LMTFAST_INLINE __mmask16 first(int64_t n) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(n)) - 1u);
}
LMTFAST_INLINE Vec zero() { return _mm512_setzero_ps(); }
LMTFAST_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
LMTFAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
LMTFAST_INLINE Vec load(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LMTFAST_INLINE Vec load_part(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first(n), p);
}
LMTFAST_INLINE Vec load_part(const uint16_t* p, int64_t n) {
  uint16_t half[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) half[i] = p[i];
  return load(half);
}
LMTFAST_INLINE Vec load_from(Vec v, int64_t lane, const float* p) {
  return _mm512_mask_loadu_ps(v, static_cast<__mmask16>(~first(lane)), p);
}
LMTFAST_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
LMTFAST_INLINE void store_part(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, first(n), v);
}
LMTFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
LMTFAST_INLINE void transpose(const float* source, int64_t from, float* target, int64_t to) {
  Vec r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = load(source + i * from);
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  // Now 4 x 4 blocks: r[4 b + j] holds column 4 l + j of rows 4 b .. 4 b + 3 in lane l.
  for (int b = 0; b < 4; ++b) {
    r[4 * b] = _mm512_shuffle_ps(s[4 * b], s[4 * b + 2], 0x44);
    r[4 * b + 1] = _mm512_shuffle_ps(s[4 * b], s[4 * b + 2], 0xEE);
    r[4 * b + 2] = _mm512_shuffle_ps(s[4 * b + 1], s[4 * b + 3], 0x44);
    r[4 * b + 3] = _mm512_shuffle_ps(s[4 * b + 1], s[4 * b + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {
    const Vec even_low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const Vec odd_low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    const Vec even_high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const Vec odd_high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
    store(target + j * to, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    store(target + (4 + j) * to, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    store(target + (8 + j) * to, _mm512_shuffle_f32x4(even_low, even_high, 0xDD));
    store(target + (12 + j) * to, _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD));
  }
}

}  // namespace avx512
LMTFAST_TARGET_END
#endif

}  // namespace lmtfast::simd
