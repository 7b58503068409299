// A call of divergence, read: its rows, a pair's parameters, its kind. A part of divergence-inl.h
// and divergence_backward-inl.h.

inline const char* RowAt(const Logits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + row * logits.stride * ElementSize(logits.dtype);
}

// A pair's parameters; false if they are out of range.
inline bool ReadParams(const DivergenceArgs& a, int64_t pair, float& k, float& t2, Shape& shape) {
  const float* p = a.params == nullptr ? nullptr : a.params + 3 * pair;
  const float temperature = p ? p[0] : a.temperature;
  shape = {p ? p[1] : a.alpha, p ? p[2] : a.beta, 0.0f};
  k = static_cast<float>(1.0 / temperature);
  t2 = a.scale_t2 ? temperature * temperature : 1.0f;
  const auto inside = [](float x) { return x > 0.0f && x < 1.0f; };
  if (!(temperature > 0.0f) || std::isinf(temperature)) return false;
  if (a.kind == Kind::kJsd) return inside(shape.beta);
  if (a.kind == Kind::kSkewForwardKl || a.kind == Kind::kSkewReverseKl) return inside(shape.alpha);
  return std::isfinite(shape.alpha) && std::isfinite(shape.beta);
}

// Turns the kind into a template argument once a call.
#define PD_FOR_KIND(FUNCTION, ...)                        \
  switch (a.kind) {                                       \
    case Kind::kForwardKl:                                \
      return FUNCTION<Kind::kForwardKl>(__VA_ARGS__);     \
    case Kind::kReverseKl:                                \
      return FUNCTION<Kind::kReverseKl>(__VA_ARGS__);     \
    case Kind::kJsd:                                      \
      return FUNCTION<Kind::kJsd>(__VA_ARGS__);           \
    case Kind::kTvd:                                      \
      return FUNCTION<Kind::kTvd>(__VA_ARGS__);           \
    case Kind::kSkewForwardKl:                            \
      return FUNCTION<Kind::kSkewForwardKl>(__VA_ARGS__); \
    case Kind::kSkewReverseKl:                            \
      return FUNCTION<Kind::kSkewReverseKl>(__VA_ARGS__); \
    case Kind::kAlphaBeta:                                \
      return FUNCTION<Kind::kAlphaBeta>(__VA_ARGS__);     \
    case Kind::kAdaptiveKl:                               \
      return FUNCTION<Kind::kAdaptiveKl>(__VA_ARGS__);    \
    case Kind::kHellinger:                                \
      return FUNCTION<Kind::kHellinger>(__VA_ARGS__);     \
    case Kind::kChi2:                                     \
      return FUNCTION<Kind::kChi2>(__VA_ARGS__);          \
    case Kind::kTodi:                                     \
      return FUNCTION<Kind::kTodi>(__VA_ARGS__);          \
  }
