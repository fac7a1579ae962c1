/* SPDX-License-Identifier: MIT */
/* The public header compiles as C, and the entry points report misuse instead of crashing. */
#include <lmtfast/lmtfast.h>
#include <stdio.h>
#include <string.h>

static int expect(int ok, const char* what) {
  if (!ok) printf("failed: %s (%s)\n", what, lmtfast_last_error());
  return ok ? 0 : 1;
}

int main(void) {
  float logits[2] = {1.0f, 0.0f}, rows[2] = {0.0f, 1.0f}, coefficient[1] = {0.0f};
  float loss[1], dlogits[2], scale[1];
  int64_t target[1] = {0}, row_index[1] = {0};
  lmtfast_margin_cross_entropy p;
  int failures = 0;

  memset(&p, 0, sizeof(p));
  p.dtype = LMTFAST_FLOAT32;
  p.member = LMTFAST_LMT;
  p.n = 1;
  p.k = 2;
  p.u = 1;
  p.logits_stride = 2;
  p.rows_stride = 2;
  p.num_threads = 1;
  p.logits = logits;
  p.target = target;
  p.row_index = row_index;
  p.rows = rows;
  p.coefficient = coefficient;

  failures += expect(lmtfast_abi_version() == LMTFAST_ABI_VERSION, "abi version");
  failures +=
      expect(sizeof(lmtfast_op_row) == LMTFAST_OP_ROW_FIELDS * sizeof(int64_t), "op row size");
  failures += expect(lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_OK,
                     "forward");
  failures += expect(loss[0] > 0.3132f && loss[0] < 0.3133f, "loss is log(1 + exp(-1))");

  loss[0] = -1.0f;
  target[0] = 2;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "target == k");
  failures +=
      expect(strstr(lmtfast_last_error(), "target[0]") != NULL, "message names the argument");
  failures += expect(loss[0] == -1.0f, "outputs untouched");
  target[0] = -1;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "target < 0");
  target[0] = 0;
  row_index[0] = 1;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "row_index == u");
  row_index[0] = 0;
  p.k = 0;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "k == 0");
  p.k = 2;
  p.dtype = 7;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "unknown dtype");
  p.dtype = LMTFAST_FLOAT32;
  p.member = 4;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "unknown member");
  p.member = LMTFAST_LMT;
  failures += expect(
      lmtfast_margin_cross_entropy_forward(&p, NULL, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "null output");
  failures += expect(
      lmtfast_margin_cross_entropy_forward(NULL, loss, dlogits, scale) == LMTFAST_INVALID_ARGUMENT,
      "null problem");

  {
    const float head[4] = {3.0f, 0.0f, 0.0f, 4.0f};
    float norms[2] = {-1.0f, -1.0f}, grad[2] = {1.0f, 1.0f}, grad_weight[4];
    int64_t classes[1] = {1};
    lmtfast_pair_norm q = {LMTFAST_FLOAT32, 2, 2, 1, 2, head, classes};
    failures += expect(lmtfast_pair_norm_forward(&q, norms, 1) == LMTFAST_OK, "pair norms");
    failures += expect(norms[0] == 5.0f && norms[1] == 0.0f, "a triangle of 3, 4 and 5");
    failures += expect(lmtfast_pair_norm_vjp(&q, norms, grad, grad_weight, 1) == LMTFAST_OK, "vjp");
    failures += expect(grad_weight[0] > 0.59f && grad_weight[0] < 0.61f, "unit difference");
    classes[0] = 2;
    failures += expect(lmtfast_pair_norm_forward(&q, norms, 1) == LMTFAST_INVALID_ARGUMENT,
                       "a class that is none");
    failures += expect(strstr(lmtfast_last_error(), "classes[0]") != NULL, "message names it");
    failures += expect(norms[0] == 5.0f, "norms untouched");
    classes[0] = 1;
    failures +=
        expect(lmtfast_pair_norm_forward(&q, NULL, 1) == LMTFAST_INVALID_ARGUMENT, "null norms");
    q.dtype = LMTFAST_FLOAT64;
    failures += expect(lmtfast_pair_norm_forward(&q, norms, 1) == LMTFAST_INVALID_ARGUMENT,
                       "a float64 head");
  }
  printf("%d failures\n", failures);
  return failures;
}
