// Matrix products of matmul.h over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "cpu/cpuid.h"
#include "cpu/matmul.h"

namespace pd {

inline void multiply(const GemmArgs& g) {
  const auto capability = static_cast<int>(active_capability());
  const GemmPlan plan = matmul_plan_table[capability](g);
  const Scratch packed(plan.packed_bytes);
  ask_for_huge_pages(packed.data(), plan.packed_bytes);
  for (int64_t first = 0; first < plan.shared_panels; first += plan.shared_block) {
    const int64_t left = plan.shared_panels - first;
    const int64_t count = left < plan.shared_block ? left : plan.shared_block;
    torch::stable::parallel_for(0, count, plan.pack_grain, [&](int64_t begin, int64_t end) {
      matmul_pack_table[capability](g, plan, first, count, begin, end, packed.data());
    });
    parallel_pieces(plan.split_panels, plan.split_grain, plan.split_unit,
                    [&](int64_t begin, int64_t end) {
                      const Scratch scratch(plan.scratch_bytes);
                      matmul_multiply_table[capability](g, plan, first, count, begin, end,
                                                        packed.data(), scratch.data());
                    });
  }
}

// Products of one left operand with several right ones. Where it is few lines, which are packed
// once, threads meet once for all of them: a small product costs little more than the meeting.
template <size_t kCount>
void multiply(const std::array<GemmArgs, kCount>& products) {
  const auto capability = static_cast<int>(active_capability());
  std::array<GemmPlan, kCount> plans;
  int64_t panels = 0, scratch_bytes = 0;
  bool together = true;
  for (size_t i = 0; i < kCount; ++i) {
    const GemmPlan p = plans[i] = matmul_plan_table[capability](products[i]);
    const GemmPlan& q = plans[0];
    const bool left_is_shared = p.split_b || (p.exchanged && !p.dots);
    together = together && left_is_shared && p.shared_block == p.shared_panels &&
               p.split_unit == 1 && p.split_b == q.split_b && p.dots == q.dots &&
               p.exchanged == q.exchanged && p.pairs == q.pairs &&
               p.shared_panels == q.shared_panels && p.steps == q.steps &&
               p.depth_block == q.depth_block && p.packed_bytes == q.packed_bytes;
    panels += p.split_panels;
    if (p.scratch_bytes > scratch_bytes) scratch_bytes = p.scratch_bytes;
  }
  if (!together) {
    for (const GemmArgs& g : products) multiply(g);
    return;
  }
  const GemmPlan& plan = plans[0];
  const int64_t count = plan.shared_panels;
  const Scratch packed(plan.packed_bytes);
  torch::stable::parallel_for(0, count, plan.pack_grain, [&](int64_t begin, int64_t end) {
    matmul_pack_table[capability](products[0], plan, 0, count, begin, end, packed.data());
  });
  parallel_pieces(panels, plan.split_grain, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    int64_t before = 0;
    for (size_t i = 0; i < kCount; ++i) {
      const int64_t here = plans[i].split_panels;
      const int64_t from = begin > before ? begin - before : 0;
      const int64_t to = end - before < here ? end - before : here;
      if (from < to) {
        matmul_multiply_table[capability](products[i], plans[i], 0, count, from, to, packed.data(),
                                          scratch.data());
      }
      before += here;
    }
  });
}

}  // namespace pd
