// A wrapper of a warpgroup's product, by its operands and its width N. The instruction names each of its N / 2 sums,
// which no template can spell; hence macros.
#pragma once
#include "device/types.h"

// The first 4, 8, ... sums as instructions name them.
#define WGMMA_NAMES_4 "%0, %1, %2, %3"
#define WGMMA_NAMES_8 WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_48 WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_64 WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_96                                                               \
  WGMMA_NAMES_64                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_128                                                                          \
  WGMMA_NAMES_96                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// `float d[n]` as operands of an asm statement.
#define WGMMA_FROM_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_FROM_8(i) WGMMA_FROM_4(i), WGMMA_FROM_4(i + 4)
#define WGMMA_FROM_16(i) WGMMA_FROM_8(i), WGMMA_FROM_8(i + 8)
#define WGMMA_FROM_32(i) WGMMA_FROM_16(i), WGMMA_FROM_16(i + 16)
#define WGMMA_FROM_48(i) WGMMA_FROM_32(i), WGMMA_FROM_16(i + 32)
#define WGMMA_FROM_64(i) WGMMA_FROM_32(i), WGMMA_FROM_32(i + 32)
#define WGMMA_FROM_96(i) WGMMA_FROM_64(i), WGMMA_FROM_32(i + 64)
#define WGMMA_FROM_128(i) WGMMA_FROM_64(i), WGMMA_FROM_64(i + 64)

// One product: the first begins the sums if `p` is false. Between two, the descriptors move on, in units of 16 bytes.
#define WGMMA_PRODUCT(instruction, count, begins, majors) \
  "wgmma.mma_async.sync.aligned." instruction " {" WGMMA_NAMES_##count "}, a, b, " begins ", 1, 1" majors ";\n"
#define WGMMA_FORWARD(step_a, step_b) \
  "add.u32 al, al, " step_a "; mov.b64 a, {al, ah}; add.u32 bl, bl, " step_b "; mov.b64 b, {bl, bh};\n"
#define WGMMA_NEXT(instruction, count, majors, step_a, step_b) \
  WGMMA_FORWARD(step_a, step_b) WGMMA_PRODUCT(instruction, count, "always", majors)
#define WGMMA_FOUR_PRODUCTS(instruction, count, majors, step_a, step_b) \
  WGMMA_PRODUCT(instruction, count, "p", majors)                        \
  WGMMA_NEXT(instruction, count, majors, step_a, step_b)                \
  WGMMA_NEXT(instruction, count, majors, step_a, step_b)                \
  WGMMA_NEXT(instruction, count, majors, step_a, step_b)

// The members of a wrapper with `count` sums. Operands are numbered: first the sums, then a, b, p, and more in `...`,
// each behind a comma.
// One asm statement for all products, because each costs the compiler time for every register that it names. The
// descriptors advance inside it (in their lower halves: shared memory is small): computed before it, they would delay
// the first product.
#define WGMMA_MEMBERS(count, b_number, p_number, products, ...)                                            \
  static __device__ __forceinline__ void multiply(float(&d)[count], u64 a, u64 b, bool accumulate) {       \
    asm volatile(                                                                                          \
        "{ .reg .pred p, always; .reg .b32 al, ah, bl, bh; .reg .b64 a, b;\n"                              \
        "setp.ne.b32 p, %" #p_number                                                                       \
        ", 0; setp.eq.b32 always, 0, 0;\n"                                                                 \
        "mov.b64 a, %" #count "; mov.b64 {al, ah}, a; mov.b64 b, %" #b_number                              \
        "; mov.b64 {bl, bh}, b;\n"                                                                         \
        "wgmma.fence.sync.aligned;\n" products "wgmma.commit_group.sync.aligned; }"                        \
        : WGMMA_FROM_##count(0)                                                                            \
        : "l"(a), "l"(b), "r"(int(accumulate))__VA_ARGS__                                                  \
        : "memory");                                                                                       \
  }                                                                                                        \
  /* No access to `d` moves across this: the compiler does not know that a product in flight writes it. */ \
  static __device__ __forceinline__ void pin(float(&d)[count]) { asm volatile("" : WGMMA_FROM_##count(0)::"memory"); }
