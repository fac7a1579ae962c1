/* SPDX-License-Identifier: MIT */
/* C ABI of lmtfast: plain structs, raw pointers, sizes and strides as int64, a status code and a
 * message.
 *
 * Rules that hold for every function:
 *  - the caller owns every buffer; nothing is allocated on its behalf and no pointer is kept;
 *  - sizes and strides count elements, never bytes; pointers may be NULL where the extent is zero;
 *  - arguments are validated before the first write: outputs are untouched unless LMTFAST_OK is
 * returned;
 *  - results are bit-identical for every num_threads;
 *  - functions may be called from several threads at once; the message belongs to the calling
 * thread.
 */
#ifndef LMTFAST_LMTFAST_H_
#define LMTFAST_LMTFAST_H_

#include <stdint.h>

#if defined(_WIN32)
#define LMTFAST_API __declspec(dllexport)
#else
#define LMTFAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows by one with every incompatible change of this header. */
#define LMTFAST_ABI_VERSION 1

typedef enum lmtfast_status {
  LMTFAST_OK = 0,
  LMTFAST_INVALID_ARGUMENT = 1,
  LMTFAST_OUT_OF_MEMORY = 2,
  LMTFAST_INTERNAL_ERROR = 3
} lmtfast_status;

typedef enum lmtfast_dtype { LMTFAST_FLOAT32 = 0, LMTFAST_FLOAT64 = 1 } lmtfast_dtype;

/* Version of the library that was loaded; compare it with LMTFAST_ABI_VERSION. */
LMTFAST_API int64_t lmtfast_abi_version(void);

/* What went wrong in this thread's last failing call; empty if none failed. Valid until its next
 * call. */
LMTFAST_API const char* lmtfast_last_error(void);

/* One linear operator of a network; a table of operators is an array of these. Axes run depth,
 * rows, columns and are right-aligned: with ndim = 2 the entries [1] and [2] are used. Unused axes
 * hold 1 (in, out, kernel, stride, dilation) or 0 (padding). A slot of -1 means none. */
#define LMTFAST_OP_ROW_AXES 3
#define LMTFAST_OP_ROW_FIELDS 33
typedef struct lmtfast_op_row {
  int64_t kind;
  int64_t weight_slot;
  int64_t row_scale_slot;
  int64_t column_scale_slot;
  int64_t ndim;
  int64_t c_out;
  int64_t c_in;
  int64_t groups;
  int64_t transposed;
  int64_t in[LMTFAST_OP_ROW_AXES];
  int64_t out[LMTFAST_OP_ROW_AXES];
  int64_t kernel[LMTFAST_OP_ROW_AXES];
  int64_t stride[LMTFAST_OP_ROW_AXES];
  int64_t pad_low[LMTFAST_OP_ROW_AXES];
  int64_t pad_high[LMTFAST_OP_ROW_AXES];
  int64_t dilation[LMTFAST_OP_ROW_AXES];
  int64_t output_padding[LMTFAST_OP_ROW_AXES];
} lmtfast_op_row;

/* How the margin enters the cross-entropy; formulas in csrc/ops/margin_cross_entropy.h. */
typedef enum lmtfast_margin_member {
  LMTFAST_LMT = 0,
  LMTFAST_LMTPP = 1,
  LMTFAST_EMMA = 2,
  LMTFAST_GLORO = 3
} lmtfast_margin_member;

/* Inputs shared by the forward and the backward call. Floating buffers are of `dtype`. */
typedef struct lmtfast_margin_cross_entropy {
  int64_t dtype;            /* lmtfast_dtype */
  int64_t member;           /* lmtfast_margin_member */
  int64_t n;                /* samples, >= 0 */
  int64_t k;                /* classes, 1 <= k < 2^31 */
  int64_t u;                /* rows of the pair-norm table, >= 0 */
  int64_t logits_stride;    /* between rows of logits */
  int64_t rows_stride;      /* between rows of the pair-norm table */
  int64_t num_threads;      /* 0: all the machine offers */
  const void* logits;       /* (n, k), unit column stride */
  const int64_t* target;    /* (n), in [0, k) */
  const int64_t* row_index; /* (n), in [0, u) */
  const void* rows; /* (u, k), unit column stride; the entry at the reference class is ignored */
  const void* coefficient; /* (n), eps_i * L */
} lmtfast_margin_cross_entropy;

/* Writes loss (n), dlogits (n, k) = d loss_i / d logits, and scale (n), which the backward call
 * needs. */
LMTFAST_API lmtfast_status lmtfast_margin_cross_entropy_forward(
    const lmtfast_margin_cross_entropy* problem, void* loss, void* dlogits, void* scale);

/* From grad_loss (n) and the forward's dlogits and scale writes grad_logits (n, k), grad_rows (u,
 * k) and grad_coefficient (n). grad_logits may be dlogits itself. */
LMTFAST_API lmtfast_status lmtfast_margin_cross_entropy_backward(
    const lmtfast_margin_cross_entropy* problem, const void* grad_loss, const void* dlogits,
    const void* scale, void* grad_logits, void* grad_rows, void* grad_coefficient);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LMTFAST_LMTFAST_H_ */
