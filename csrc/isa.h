#pragma once
#include <cstdint>  // also brings __GLIBC__ into view

// STN_FAST_CLONES marks a leaf function that is compiled once per instruction set and chosen when the module is loaded.
// It needs ifunc (glibc) and names for the x86-64 levels (GCC 12); elsewhere the plain function is compiled once.
// An OpenMP region is outlined into a function of its own, which a clone would not reach: so threads are started in a plain
// driver, and the clone is what each of them calls.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__) && defined(__GNUC__) && \
    __GNUC__ >= 12
#define STN_FAST_HAS_CLONES 1
#define STN_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STN_FAST_HAS_CLONES 0
#define STN_FAST_CLONES
#endif

// What a clone calls must become part of it, or it would run the baseline's code.
#if defined(__GNUC__) || defined(__clang__)
#define STN_FAST_INLINE inline __attribute__((always_inline))
#define STN_FAST_INLINE_LAMBDA __attribute__((always_inline))
#define STN_FAST_NO_INLINE __attribute__((noinline))
#define STN_FAST_RESTRICT __restrict__
#elif defined(_MSC_VER)
#define STN_FAST_INLINE __forceinline
#define STN_FAST_INLINE_LAMBDA
#define STN_FAST_NO_INLINE __declspec(noinline)
#define STN_FAST_RESTRICT __restrict
#else
#define STN_FAST_INLINE inline
#define STN_FAST_INLINE_LAMBDA
#define STN_FAST_NO_INLINE
#define STN_FAST_RESTRICT
#endif

namespace stn_fast {

// The instruction set that the clones run with: "x86-64-v4" (AVX-512), "x86-64-v3" (AVX2) or "baseline".
inline const char* isa() {
#if STN_FAST_HAS_CLONES
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
    return "baseline";
}

// Who made the processor: "amd", "intel" or "other".
inline const char* vendor() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_is("amd")) return "amd";
    if (__builtin_cpu_is("intel")) return "intel";
#endif
    return "other";
}

inline bool openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

}  // namespace stn_fast
