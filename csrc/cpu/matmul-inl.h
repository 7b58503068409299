// The matrix product as an operator of its own: gemm-inl.h under the names of matmul.h.
#include "cpu/gemm-inl.h"
#include "cpu/matmul.h"

namespace pd::PD_NAMESPACE {

GemmPlan matmul_plan(const GemmArgs& g) { return PlanGemm(g); }

void matmul_pack(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count, int64_t begin,
                 int64_t end, float* packed) {
  PackSharedPanels(g, p, first, count, begin, end, packed);
}

void matmul_multiply(const GemmArgs& g, const GemmPlan& p, int64_t first, int64_t count,
                     int64_t begin, int64_t end, const float* packed, float* scratch) {
  MultiplySplitPanels(g, p, first, count, begin, end, packed, scratch);
}

}  // namespace pd::PD_NAMESPACE
