// Every instruction set's verification on small, odd shapes, against the maths written out once
// more in fp64, and, under the sanitizers, nothing outside its memory.
#include "cpu/verify.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "cpu/cpuid.h"
#include "tests/exact.h"

namespace pd {
namespace {

struct Shape {
  int64_t batch, slots, vocab;
};

struct Warpers {
  double temperature, top_k, top_p, min_p;
};

class Problem {
 public:
  Problem(const Shape& shape, DType dtype, const Warpers& warpers, bool one_hot)
      : shape_(shape),
        dtype_(dtype),
        one_hot_(one_hot),
        target_(Count(shape.slots + 1) * size_of(dtype)),
        draft_(Count(shape.slots) * size_of(dtype)),
        ids_(static_cast<size_t>(shape.batch * shape.slots)),
        parent_(ids_.size()),
        support_(static_cast<size_t>(Count(shape.slots))) {
    std::mt19937 random(static_cast<unsigned>(shape.vocab + shape.slots));
    Fill(target_, random);
    Fill(draft_, random);
    for (size_t i = 0; i < ids_.size(); ++i) ids_[i] = random() % unsigned(shape.vocab);
    for (size_t i = 0; i < ids_.size(); ++i) {
      const size_t node = i % static_cast<size_t>(shape.slots);
      parent_[i] = static_cast<int32_t>(random() % (node + 1)) - 1;
      if (random() % 16 == 0) parent_[i] = int32_t(random() % 9) - 4;  // none, perhaps
    }
    // Every token of the draft's row, so that it is the same as without.
    for (size_t i = 0; i < support_.size(); ++i) support_[i] = int64_t(i) % shape.vocab;
    const double numbers[] = {warpers.temperature, warpers.top_k, warpers.top_p,
                              std::log(warpers.min_p)};
    for (size_t i = 0; i < 2 * kWarpers; ++i) warpers_[i] = numbers[i % kWarpers];
  }

  void Check(int capability, const char* name, VerifyMethod method, Lenience lenience,
             bool sparse = false) const {
    const auto batch = static_cast<size_t>(shape_.batch), slots = static_cast<size_t>(shape_.slots);
    const size_t rows = batch * (slots + 1);
    Exact<int64_t> tokens(rows, -7), accepted(batch, -7), path(batch * slots, -7), drafted(batch),
        position(batch), seed(1);
    Exact<float> logprobs(rows), target_lse(rows), overlap(batch * slots), tv(batch * slots),
        draft_lse(batch * slots);
    Exact<int32_t> flags(rows, -7);
    for (size_t i = 0; i < batch; ++i) {
      drafted[i] = static_cast<int64_t>(i % (slots + 1)), position[i] = 5 * static_cast<int64_t>(i);
    }
    const auto base = [](const Bytes& x) { return reinterpret_cast<const char*>(x.data()); };
    const int64_t row = shape_.vocab;
    VerifyArgs a{};
    a.dtype = dtype_;
    a.slots = shape_.slots;
    a.vocab = shape_.vocab;
    a.target = {base(target_), (shape_.slots + 1) * row, row};
    const bool tree = method >= kVerifyTargetOnly,
               pointed = one_hot_ || method == kVerifyTargetOnly;
    if (tree) a.parent = parent_.data();
    a.parent_step = shape_.slots;
    if (!pointed) a.draft = {base(draft_), shape_.slots * row, row};
    if (sparse && !pointed) {
      a.support = support_.data();
      a.support_size = a.support_row_step = row;
      a.support_request_step = shape_.slots * row;
    }
    a.ids = ids_.data();
    a.num_drafted = drafted.data();
    a.drafted_step = a.position_step = 1;
    a.position = position.data();
    a.seed = seed.data();
    a.warpers = warpers_;
    a.method = method;
    a.lenience = lenience;
    a.strength = 0.5;
    a.alpha = 0.4;
    a.tokens = tokens.data();
    a.num_accepted = accepted.data();
    a.logprobs = logprobs.data();
    a.target_lse = target_lse.data();
    a.overlap = overlap.data();
    a.tv = tv.data();
    a.draft_lse = draft_lse.data();
    a.flags = flags.data();
    a.path = path.data();
    Exact<double> scratch(static_cast<size_t>(verify_scratch_bytes(a) + 7) / sizeof(double));
    verify_requests_table[capability](a, 0, shape_.batch, nullptr,
                                      reinterpret_cast<float*>(scratch.data()));
    if (!pointed && !sparse) CheckGradient(a, capability, name);
    for (size_t b = 0; b < batch; ++b) {
      const int64_t n = accepted[b];
      EXPECT(n >= 0 && n <= drafted[b], "%s accepted %d of %d", name, int(n), int(drafted[b]));
      int64_t row = 0;  // of the target, for the token at offset i
      for (size_t i = 0; i <= slots; ++i) {
        const int64_t token = tokens[b * (slots + 1) + i];
        const auto at = static_cast<int64_t>(i);
        const bool one = at <= n;
        EXPECT(one ? token >= 0 && token < shape_.vocab : token == -1, "%s token %d", name,
               int(token));
        const size_t place = b * (slots + 1) + static_cast<size_t>(row);
        if (one) CheckToken(place, token, logprobs[b * (slots + 1) + i], target_lse[place], name);
        if (i == slots) break;
        const int64_t node = path[b * slots + i];
        EXPECT(at < n ? node >= 0 && node < drafted[b] : node == -1, "%s node %d", name, int(node));
        if (at < n) {
          const size_t index = b * slots + static_cast<size_t>(node);
          EXPECT(token == ids_[index], "%s changed a drafted token", name);
          EXPECT((tree ? parent_[index] : node - 1) == row - 1, "%s left the path", name);
          row = node + 1;
        }
        if (!std::isnan(overlap[b * slots + i]) && !(tree && pointed)) {
          CheckOverlap(b, i, overlap[b * slots + i], name);
        }
      }
    }
  }

  // The total variation of evaluated rows is 1 - overlap; others have a gradient of 0.
  void CheckGradient(const VerifyArgs& a, int capability, const char* name) const {
    Bytes gradient(draft_.size(), 0x55);
    Exact<float> divergence(static_cast<size_t>(shape_.batch * shape_.slots));
    Exact<double> scratch(static_cast<size_t>(verify_gradient_bytes(a) + 7) / sizeof(double));
    VerifyGradient g{};
    g.kind = Kind::kTvd;
    g.divergence = divergence.data();
    g.gradient = {reinterpret_cast<const char*>(gradient.data()), shape_.slots * shape_.vocab,
                  shape_.vocab};
    verify_gradient_rows_table[capability](a, g, 0, shape_.batch * shape_.slots,
                                           reinterpret_cast<float*>(scratch.data()));
    for (size_t i = 0; i < divergence.size(); ++i) {
      const bool seen = !std::isnan(a.overlap[i]) && warpers_[kTemperature] > 0;
      EXPECT(std::isnan(divergence[i]) == !seen, "%s divergence %g", name, divergence[i]);
      if (seen) {
        const double want = 1 - double(a.overlap[i]);
        EXPECT(std::fabs(divergence[i] - want) <= 2e-6, "%s total variation %.9g, not %.9g", name,
               divergence[i], want);
        continue;
      }
      for (size_t j = 0; j < static_cast<size_t>(shape_.vocab); ++j) {
        const size_t at = (i * static_cast<size_t>(shape_.vocab) + j) * size_of(dtype_);
        EXPECT(decode(gradient.data() + at, dtype_) == 0, "%s gradient of an unseen row", name);
      }
    }
  }

 private:
  size_t Count(int64_t rows) const {
    return static_cast<size_t>(shape_.batch * rows * shape_.vocab);
  }

  void Fill(Bytes& bytes, std::mt19937& random) const {
    for (size_t i = 0; i < bytes.size() / size_of(dtype_); ++i) {
      const float x = static_cast<float>(int(random() % 101) - 50) / 16.0f;
      encode(x, dtype_, bytes.data() + i * size_of(dtype_));
    }
  }

  // The warped distribution of a row.
  std::vector<double> Warped(const Bytes& bytes, size_t row) const {
    const auto vocab = static_cast<size_t>(shape_.vocab);
    std::vector<double> x(vocab), p(vocab);
    for (size_t i = 0; i < vocab; ++i) {
      x[i] = decode(bytes.data() + (row * vocab + i) * size_of(dtype_), dtype_);
    }
    std::vector<double> ordered = x;
    std::sort(ordered.begin(), ordered.end(), std::greater<double>());
    const double max = ordered[0], t = warpers_[kTemperature];
    double cut = max + t * warpers_[kLogMinP], whole = 0, above = 0;
    const double k = warpers_[kTopK];
    if (k > 0 && k < double(vocab)) cut = std::max(cut, ordered[static_cast<size_t>(k) - 1]);
    const double kth = k > 0 && k < double(vocab) ? ordered[static_cast<size_t>(k) - 1] : -INFINITY;
    for (const double v : ordered) whole += v >= kth ? std::exp((v - max) / t) : 0;
    for (size_t i = 0; i < vocab && warpers_[kTopP] < 1;) {
      if (!(above < warpers_[kTopP] * whole)) break;
      const double v = ordered[i];
      for (; i < vocab && ordered[i] == v; ++i) above += std::exp((v - max) / t);
      if (i == vocab || !(above < warpers_[kTopP] * whole)) cut = std::max(cut, v);
    }
    double total = 0;
    for (const double v : x) total += v >= cut ? std::exp((v - max) / t) : 0;
    for (size_t i = 0; i < vocab; ++i) p[i] = x[i] >= cut ? std::exp((x[i] - max) / t) / total : 0;
    return p;
  }

  void CheckToken(size_t row, int64_t token, float got, float target_lse, const char* name) const {
    if (warpers_[kTemperature] == 0) {
      EXPECT(std::isnan(target_lse), "%s normaliser %g", name, target_lse);
      return;
    }
    const double want = std::log(Warped(target_, row)[static_cast<size_t>(token)]);
    EXPECT(double(got) == want || std::fabs(got - want) <= 1e-5 * (1 + std::fabs(want)),
           "%s log-probability %.9g, in fp64 %.9g", name, got, want);
  }

  void CheckOverlap(size_t b, size_t slot, double got, const char* name) const {
    if (warpers_[kTemperature] == 0) return;
    const auto slots = static_cast<size_t>(shape_.slots);
    const std::vector<double> p = Warped(target_, b * (slots + 1) + slot);
    const auto id = static_cast<size_t>(ids_[b * slots + slot]);
    double want = p[id];
    if (!one_hot_) {
      const std::vector<double> q = Warped(draft_, b * slots + slot);
      want = 0;
      for (size_t i = 0; i < p.size(); ++i) want += std::min(p[i], q[i]);
    }
    EXPECT(std::fabs(got - want) <= 2e-6, "%s overlap %.9g, in fp64 %.9g", name, got, want);
  }

  Shape shape_;
  DType dtype_;
  bool one_hot_;
  Bytes target_, draft_;
  Exact<int64_t> ids_;
  Exact<int32_t> parent_;
  Exact<int64_t> support_;
  double warpers_[2 * kWarpers];
};

int Main() {
  const Shape shapes[] = {{1, 0, 3},    {3, 1, 1}, {4, 2, 17}, {3, 2, 67},  {3, 3, 1024},
                          {2, 1, 2113}, {8, 7, 5}, {5, 9, 40}, {3, 6, 1100}};
  const Warpers warpers[] = {
      {1, 0, 1, 0}, {0.7, 5, 1, 0}, {1.5, 0, 0.8, 0}, {1.2, 40, 0.9, 0.05}, {0, 0, 1, 0}};
  for (const Shape& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (const Warpers& w : warpers) {
        for (const bool one_hot : {false, true}) {
          const Problem problem(shape, dtype, w, one_hot);
          for (int i = 0; i <= static_cast<int>(detected_capability()); ++i) {
            const char* name = capability_name(static_cast<Capability>(i));
            problem.Check(i, name, kVerifyBlock, kStrict);
            problem.Check(i, name, kVerifyBlock, kStrict, true);
            problem.Check(i, name, kVerifyTraversal, kStrict, true);
            problem.Check(i, name, kVerifyTypical, kStrict);
            for (const auto method : {kVerifyTargetOnly, kVerifyTree, kVerifyTraversal}) {
              problem.Check(i, name, method, kStrict);
            }
            for (int form = kStrict; form < kLeniences; ++form) {
              problem.Check(i, name, kVerifyToken, static_cast<Lenience>(form));
            }
          }
        }
      }
    }
  }
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace pd

int main() { return pd::Main(); }
