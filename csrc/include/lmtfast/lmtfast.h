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
#define LMTFAST_ABI_VERSION 2

typedef enum lmtfast_status {
  LMTFAST_OK = 0,
  LMTFAST_INVALID_ARGUMENT = 1,
  LMTFAST_OUT_OF_MEMORY = 2,
  LMTFAST_INTERNAL_ERROR = 3,
  LMTFAST_DEVICE_ERROR = 4
} lmtfast_status;

typedef enum lmtfast_dtype {
  LMTFAST_FLOAT32 = 0,
  LMTFAST_FLOAT64 = 1,
  LMTFAST_BFLOAT16 = 2
} lmtfast_dtype;

/* Version of the library that was loaded; compare it with LMTFAST_ABI_VERSION. */
LMTFAST_API int64_t lmtfast_abi_version(void);

/* What went wrong in this thread's last failing call; empty if none failed. Valid until its next
 * call. */
LMTFAST_API const char* lmtfast_last_error(void);

/* One linear operator of a network as a forward stencil: output o of group g reads input
 * stride * o + dilation * t - pad_low at tap t, with a (rows, channels) matrix per tap. Weights are
 * (groups * rows, channels, taps), or (groups * rows, taps, channels) for a tap-major tensor. A
 * transposed convolution is the adjoint of its stencil; a matrix is a stencil with one tap and one
 * position. The operator acts with diag(row scale) W diag(column scale) + identity * delta, delta
 * the matrix that takes channel c to row c of each group at the centre tap, pad_low / dilation.
 *
 * Axes run depth, rows, columns and are right-aligned: with axes = 2 the entries [1] and [2] are
 * used. Unused axes hold 1 (in, out, kernel, stride, dilation) or 0 (padding).
 *
 * A diagonal map has no weight and no iterate: its norm is the largest modulus of the `rows` entries
 * of the scale buffer from row_scale on; groups is 1, all other fields are zero. */
#define LMTFAST_OP_ROW_AXES 3
#define LMTFAST_OP_ROW_FIELDS 36
typedef enum lmtfast_kind {
  LMTFAST_ELSEWHERE = 0, /* not run here, all else zero */
  LMTFAST_STENCIL = 1,
  LMTFAST_DIAGONAL = 2
} lmtfast_kind;
typedef struct lmtfast_op_row {
  int64_t kind;         /* lmtfast_kind */
  int64_t engine;       /* lmtfast_engine */
  int64_t weight_slot;  /* into the tensors of a call */
  int64_t row_scale;    /* offset in the scale buffer, groups * rows entries; -1: none */
  int64_t column_scale; /* offset in the scale buffer, groups * channels entries; -1: none */
  int64_t axes;         /* 0 (a matrix) to 3 */
  int64_t groups;
  int64_t rows;     /* per group */
  int64_t channels; /* per group */
  int64_t transposed;
  int64_t circular; /* padding wraps around; at most once */
  double identity;
  int64_t rank; /* of the separable engine: min(8, channels, input positions) */
  int64_t state_offset;
  int64_t saved_offset;
  int64_t in[LMTFAST_OP_ROW_AXES];
  int64_t out[LMTFAST_OP_ROW_AXES];
  int64_t kernel[LMTFAST_OP_ROW_AXES];
  int64_t stride[LMTFAST_OP_ROW_AXES];
  int64_t pad_low[LMTFAST_OP_ROW_AXES];
  int64_t pad_high[LMTFAST_OP_ROW_AXES];
  int64_t dilation[LMTFAST_OP_ROW_AXES];
} lmtfast_op_row;

typedef enum lmtfast_engine {
  LMTFAST_OPERATOR = 0,
  LMTFAST_SYMBOL = 1,
  LMTFAST_SEPARABLE = 2
} lmtfast_engine;

/* Candidate frequencies of the symbol engine per group, and the largest rank of the separable one. */
#define LMTFAST_CANDIDATES 2
#define LMTFAST_RANK 8

/* The scale buffer starts as ones; each row multiplies entries [offset, offset + length), in order,
 * by  constant * t[slot] / sqrt(t[variance_slot] + eps),  or by its inverse. A slot of -1 is left
 * out; a tensor of one entry serves all. */
#define LMTFAST_SCALE_ROW_FIELDS 7
typedef struct lmtfast_scale_row {
  int64_t offset;
  int64_t length;
  int64_t slot;
  int64_t variance_slot;
  int64_t inverse;
  double eps;
  double constant;
} lmtfast_scale_row;

/* One step of the composition; a and b are earlier steps, for LMTFAST_SIGMA a is an operator. */
typedef enum lmtfast_operation {
  LMTFAST_CONSTANT = 0,
  LMTFAST_SIGMA = 1,
  LMTFAST_MUL = 2,
  LMTFAST_ADD = 3,
  LMTFAST_HYPOT = 4,
  LMTFAST_MAX = 5
} lmtfast_operation;
#define LMTFAST_INSTRUCTION_FIELDS 4
typedef struct lmtfast_instruction {
  int64_t operation;
  int64_t a;
  int64_t b;
  double constant;
} lmtfast_instruction;

typedef struct lmtfast_network {
  const lmtfast_op_row* rows;
  const lmtfast_scale_row* scales;
  const lmtfast_instruction* tape;
  int64_t n_rows;
  int64_t n_scales;
  int64_t n_tape;
  int64_t features; /* the step of the tape that is the features' bound, and the logits' */
  int64_t total;
  int64_t scale_size; /* entries of the scale buffer */
  int64_t saved_size; /* entries of the saved buffer: the scale buffer, then the operators' */
  int64_t state_size; /* entries of the iterates, those of operators run elsewhere included */
} lmtfast_network;

/* A dense tensor. Only weights may be bfloat16 or tap-major; scales are float32. None is both. */
typedef struct lmtfast_tensor {
  void* data; /* NULL: absent */
  int64_t dtype;
  int64_t size;
  int64_t tap_major;
} lmtfast_tensor;

/* One step of every operator of the table that is run here. Reads state (state_size), writes
 * sigmas (n_rows) and saved (saved_size), and new_state (state_size) unless it is NULL: then the
 * iterates stay and sigma is read before a step. Entries of operators run elsewhere are left
 * untouched. Layouts and formulas: csrc/ops/spectral.h. */
LMTFAST_API lmtfast_status lmtfast_spectral_step(const lmtfast_network* network,
                                                 const lmtfast_tensor* tensors, int64_t n_tensors,
                                                 const float* state, float* new_state,
                                                 float* sigmas, float* saved, int64_t num_threads);

/* Gradient of <grad_sigmas, sigmas>, as saved by a step, in every tensor whose entry of grads has
 * data. Gradients are float32, in the layout of their tensor, and overwritten; those of tensors
 * that no operator run here reads become zero. */
LMTFAST_API lmtfast_status lmtfast_spectral_vjp(const lmtfast_network* network,
                                                const lmtfast_tensor* tensors, int64_t n_tensors,
                                                const float* saved, const float* grad_sigmas,
                                                const lmtfast_tensor* grads, int64_t num_threads);

/* One operator of the table by itself, whatever its engine: u = A v, v = A^T u, and the gradient of
 * <u, A v> in every tensor whose entry of grads has data, as lmtfast_spectral_vjp writes it. v is
 * (input channels, positions), u (output channels, positions); a matrix acts on one position. */
LMTFAST_API lmtfast_status lmtfast_matvec(const lmtfast_network* network, int64_t row,
                                          const lmtfast_tensor* tensors, int64_t n_tensors,
                                          const float* v, float* u, int64_t num_threads);
LMTFAST_API lmtfast_status lmtfast_rmatvec(const lmtfast_network* network, int64_t row,
                                           const lmtfast_tensor* tensors, int64_t n_tensors,
                                           const float* u, float* v, int64_t num_threads);
LMTFAST_API lmtfast_status lmtfast_weight_vjp(const lmtfast_network* network, int64_t row,
                                              const lmtfast_tensor* tensors, int64_t n_tensors,
                                              const float* u, const float* v,
                                              const lmtfast_tensor* grads, int64_t num_threads);

/* Sizes of lmtfast_power_vectors. */
typedef struct lmtfast_power_problem {
  int64_t groups;
  int64_t rows;
  int64_t channels;
  int64_t taps;
  int64_t phases;
  int64_t frequencies;
  int64_t steps;
} lmtfast_power_problem;

/* Power steps on A(w) = sum over taps of W_t terms[w, t] at many frequencies, from one start: norm
 * estimates (groups, frequencies) and unit vectors (groups, frequencies, phases * channels, 2).
 * acting (groups, rows, channels, taps) is of modulus one at most, phase (taps) says which part of
 * the vector a tap reads, terms (frequencies, taps, 2) and start (phases * channels, 2) are pairs
 * (re, im). */
LMTFAST_API lmtfast_status lmtfast_power_vectors(const lmtfast_power_problem* problem,
                                                 const float* acting, const int64_t* phase,
                                                 const float* terms, const float* start,
                                                 float* norms, float* vectors, int64_t num_threads);

/* Runs the tape: values (2) are the bounds of features and logits, jacobian (2, n_rows) their
 * derivatives in the norms. Where an operand of hypot or max ties or vanishes, the derivative is
 * the one PyTorch takes: half to each side of a tie, zero at the origin. */
LMTFAST_API lmtfast_status lmtfast_compose(const lmtfast_network* network, const float* sigmas,
                                           float* values, float* jacobian);

/* How the margin enters the cross-entropy; formulas in csrc/ops/margin_cross_entropy.h. */
typedef enum lmtfast_margin_member {
  LMTFAST_LMT = 0,
  LMTFAST_LMTPP = 1,
  LMTFAST_EMMA = 2,
  LMTFAST_GLORO = 3
} lmtfast_margin_member;

/* Inputs shared by the forward and the backward call. Logits and their gradient are of `dtype`, all
 * other floating buffers too, but float32 for bfloat16 logits. */
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
 * k) and grad_coefficient (n). grad_logits may be dlogits itself, unless the logits are bfloat16. */
LMTFAST_API lmtfast_status lmtfast_margin_cross_entropy_backward(
    const lmtfast_margin_cross_entropy* problem, const void* grad_loss, const void* dlogits,
    const void* scale, void* grad_logits, void* grad_rows, void* grad_coefficient);

/* Distances between rows of a linear head. */
typedef struct lmtfast_pair_norm {
  int64_t dtype;          /* lmtfast_dtype of the head; norms and grad are float64 for float64, else
                             float32 */
  int64_t k;              /* rows of the head, >= 0 */
  int64_t d;              /* columns, >= 0 */
  int64_t u;              /* rows of the table, >= 0; k where classes is NULL */
  int64_t weight_stride;  /* between rows of the head */
  const void* weight;     /* (k, d), unit column stride */
  const int64_t* classes; /* (u), in [0, k); NULL: every row, in order */
} lmtfast_pair_norm;

/* Writes norms (u, k): the distance of row classes[u] from row j, exactly 0 where they are one. On
 * the CPU for float32 and bfloat16 heads; method and accuracy: csrc/ops/pair_norm.h. */
LMTFAST_API lmtfast_status lmtfast_pair_norm_forward(const lmtfast_pair_norm* problem, float* norms,
                                                     int64_t num_threads);

/* From norms and their gradient, both (u, k), writes grad_weight (k, d), of the head's dtype. A pair
 * at distance 0 contributes 0. */
LMTFAST_API lmtfast_status lmtfast_pair_norm_vjp(const lmtfast_pair_norm* problem,
                                                 const float* norms, const float* grad,
                                                 void* grad_weight, int64_t num_threads);

#ifdef __cplusplus
} /* extern "C" */
#endif

#include "lmtfast/cuda.h"

#endif /* LMTFAST_LMTFAST_H_ */
