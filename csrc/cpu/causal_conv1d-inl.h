// A causal convolution of each channel along the tokens of its sequence, with an optional SiLU,
// forward and backward. docs/ops/causal_conv1d.md has the maths.
//
// A unit of work is a few hundred tokens of a block of channels: its taps and the last W tokens
// stay in the first-level cache, so that memory is read once. Lanes are channels. A unit is taken
// piece by piece, a piece being the tokens of one sequence. Backward computes the slopes of a piece
// and of the W - 1 tokens behind it, which two units do, so that none waits for another.
#include <algorithm>
#include <memory>

#include "cpu/causal_conv1d.h"
#include "cpu/math-inl.h"
#include "cpu/numbers-inl.h"

namespace pd::PD_NAMESPACE {
namespace {

// `n` numbers from the first-th as fp32.
inline void Widen(const Numbers& x, int64_t first, int64_t n, float* out) {
  WithNumbers(x.dtype, [&](auto type) {
    using Type = decltype(type);
    const auto p = static_cast<Pointer<Type>>(x.data) + first;
    for (int64_t i = 0; i < n; i += kLanes) Put<F32>(Get<Type>(p, i, n), out, i, n);
  });
}

// sigmoid(x) and 1 - sigmoid(x), each with all its digits.
PD_INLINE void Gates(V x, V& gate, V& rest) {
  const V one = Set(1.0f), e = Exp(Neg(Abs(x))), below = one / (one + e), above = e * below;
  const M negative = Lt(x, Set(0.0f));
  gate = Select(negative, above, below);
  rest = Select(negative, below, above);
}

// Memory of a thread: rows of kConvChannels numbers.
struct Room {
  explicit Room(int64_t w)
      : floats(new float[static_cast<size_t>((4 * w + 2) * kConvChannels)]),
        taps(floats.get()),
        slopes(taps + (w + 1) * kConvChannels),
        sums(slopes + w * kConvChannels),
        window(sums + (w + 1) * kConvChannels) {}

  // The taps and the bias of the `n` channels from the first-th, and zeros behind them.
  void LoadTaps(const ConvArgs& a, int64_t first, int64_t n) const {
    const int64_t w = a.width;
    std::memset(taps, 0, static_cast<size_t>((w + 1) * kConvChannels) * sizeof(float));
    Widen(a.weight, first * w, n * w, slopes);
    for (int64_t j = 0; j < w; ++j) {
      for (int64_t i = 0; i < n; ++i) taps[j * kConvChannels + i] = slopes[i * w + j];
    }
    if (a.bias.data == nullptr) return;
    Widen(a.bias, first, n, slopes);
    std::memcpy(taps + w * kConvChannels, slopes, static_cast<size_t>(n) * sizeof(float));
  }

  std::unique_ptr<float[]> floats;
  float* taps;    // W rows, and one of the bias
  float* slopes;  // d loss / d pre of W tokens, that of t in row t mod W
  float* sums;    // of the weight's gradient, W rows, and the bias's
  void* window;   // W tokens
};

// The last W tokens up to one, `step` numbers apart.
template <class Type>
struct Window {
  Pointer<Type> tokens;
  int64_t step;
};

// Tokens of one sequence, in a block of `n` channels from the first-th.
template <class Type>
class Piece {
  using T = typename Type::T;

 public:
  Piece(const ConvArgs& a, const Room& room, int64_t sequence, int64_t first, int64_t n)
      : a_(a), room_(room), sequence_(sequence), start_(a.starts[sequence]), first_(first), n_(n) {}

  void Forward(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) {
      const Window<Type> window = WindowAt(t);
      T* out = Row(a_.out, t);
      for (int64_t i = 0; i < n_; i += kLanes) {
        V pre = Pre(window, i), gate, rest;
        if (a_.silu) {
          Gates(pre, gate, rest);
          pre = pre * gate;
        }
        Put<Type>(pre, out, i, n_);
      }
    }
  }

  // `sums` of the room goes on, or is left alone.
  void Backward(int64_t begin, int64_t end, bool sums) const {
    const int64_t w = a_.width, stop = a_.starts[sequence_ + 1];
    std::memset(room_.slopes, 0, static_cast<size_t>(w * kConvChannels) * sizeof(float));
    for (int64_t t = begin; t < end + w - 1; ++t) {
      float* slope = room_.slopes + t % w * kConvChannels;
      if (t < stop) {
        const Window<Type> window = WindowAt(t);
        Slope(t, window, slope);
        if (sums && t < end) Add(window, slope);
      } else {
        std::memset(slope, 0, kConvChannels * sizeof(float));
      }
      const int64_t s = t - w + 1;
      if (s >= begin) {
        Pull(t, Row(a_.grad_x, s));
      } else if (begin == start_ && a_.grad_state != nullptr) {
        Pull(t, static_cast<T*>(a_.grad_state) + Earlier(s));
      }
    }
  }

 private:
  PD_INLINE Pointer<Type> Row(const Logits& x, int64_t t) const {
    return static_cast<Pointer<Type>>(x.data) + t * x.stride + first_;
  }
  PD_INLINE T* Row(void* x, int64_t t) const {
    return static_cast<T*>(x) + t * a_.x.width + first_;
  }
  // Where the state has the token at t, before the sequence.
  PD_INLINE int64_t Earlier(int64_t t) const {
    return (sequence_ * (a_.width - 1) + t - start_ + a_.width - 1) * a_.x.width + first_;
  }

  // The tokens up to t; put together where some of them are not of the sequence.
  Window<Type> WindowAt(int64_t t) const {
    const int64_t first = t - a_.width + 1;
    if (first >= start_) return {Row(a_.x, first), a_.x.stride};
    const auto bytes = static_cast<size_t>(n_) * sizeof(T);
    T* const window = static_cast<T*>(room_.window);
    for (int64_t j = 0; j < a_.width; ++j) {
      T* to = window + j * kConvChannels;
      if (first + j >= start_) {
        std::memcpy(to, Row(a_.x, first + j), bytes);
      } else if (a_.state != nullptr) {
        std::memcpy(to, static_cast<Pointer<Type>>(a_.state) + Earlier(first + j), bytes);
      } else {
        std::memset(to, 0, bytes);
      }
    }
    return {window, kConvChannels};
  }

  PD_INLINE V Pre(const Window<Type>& window, int64_t i) const {
    const int64_t w = a_.width;
    const float* taps = room_.taps + i;
    V total = Load(taps + w * kConvChannels);
    for (int64_t j = 0; j < w; ++j) {
      const V x = Get<Type>(window.tokens + j * window.step, i, n_);
      total = Fma(Load(taps + j * kConvChannels), x, total);
    }
    return total;
  }

  // d loss / d pre at t.
  void Slope(int64_t t, const Window<Type>& window, float* slope) const {
    const auto grad = Row(a_.grad_out, t);
    for (int64_t i = 0; i < n_; i += kLanes) {
      V up = Get<Type>(grad, i, n_);
      if (a_.silu) {
        V gate, rest;
        const V pre = Pre(window, i);
        Gates(pre, gate, rest);
        up = up * (gate * Fma(pre, rest, Set(1.0f)));
      }
      Store(up, slope + i);
    }
  }

  void Add(const Window<Type>& window, const float* slope) const {
    const int64_t w = a_.width;
    for (int64_t j = 0; j <= w; ++j) {
      const auto x = window.tokens + j * window.step;
      float* sum = room_.sums + j * kConvChannels;
      for (int64_t i = 0; i < n_; i += kLanes) {
        const V up = Load(slope + i);
        Store(j == w ? Load(sum + i) + up : Fma(up, Get<Type>(x, i, n_), Load(sum + i)), sum + i);
      }
    }
  }

  // The gradient of the token W - 1 before t, which tap j meets at t - j.
  void Pull(int64_t t, T* out) const {
    const int64_t w = a_.width, last = t % w;
    for (int64_t i = 0; i < n_; i += kLanes) {
      V total = Set(0.0f);
      for (int64_t j = 0; j < w; ++j) {
        const int64_t at = last - j < 0 ? last - j + w : last - j;
        total = Fma(Load(room_.taps + j * kConvChannels + i),
                    Load(room_.slopes + at * kConvChannels + i), total);
      }
      Put<Type>(total, out, i, n_);
    }
  }

  const ConvArgs& a_;
  const Room& room_;
  int64_t sequence_, start_, first_, n_;
};

// Calls f(sequence, begin, end) for the pieces of a unit.
template <class F>
inline void Pieces(const ConvArgs& a, int64_t unit, const F& f) {
  const int64_t first = unit / conv_blocks(a) * kConvTokens;
  const int64_t last = std::min(a.x.rows, first + kConvTokens);
  const int64_t* starts = a.starts;
  int64_t sequence = std::upper_bound(starts, starts + a.sequences + 1, first) - starts - 1;
  for (int64_t begin = first; begin < last; ++sequence) {
    const int64_t end = std::min(last, starts[sequence + 1]);
    if (begin < end) f(sequence, begin, end);
    begin = end;
  }
}

template <class Type>
inline void ForwardUnit(const ConvArgs& a, int64_t unit, const Room& room) {
  const int64_t channel = unit % conv_blocks(a) * kConvChannels;
  const int64_t n = std::min(kConvChannels, a.x.width - channel);
  room.LoadTaps(a, channel, n);
  Pieces(a, unit, [&](int64_t sequence, int64_t begin, int64_t end) {
    Piece<Type>(a, room, sequence, channel, n).Forward(begin, end);
  });
}

template <class Type>
inline void BackwardUnit(const ConvArgs& a, int64_t unit, const Room& room) {
  const int64_t channel = unit % conv_blocks(a) * kConvChannels, w = a.width;
  const int64_t n = std::min(kConvChannels, a.x.width - channel);
  room.LoadTaps(a, channel, n);
  std::memset(room.sums, 0, static_cast<size_t>((w + 1) * kConvChannels) * sizeof(float));
  Pieces(a, unit, [&](int64_t sequence, int64_t begin, int64_t end) {
    Piece<Type>(a, room, sequence, channel, n).Backward(begin, end, a.parts != nullptr);
  });
  if (a.parts == nullptr) return;
  float* parts = a.parts + unit / conv_blocks(a) * (w + 1) * a.x.width + channel;
  for (int64_t j = 0; j <= w; ++j) {
    std::memcpy(parts + j * a.x.width, room.sums + j * kConvChannels,
                static_cast<size_t>(n) * sizeof(float));
  }
}

template <bool kForward>
inline void Units(const ConvArgs& a, int64_t begin, int64_t end) {
  const Room room(a.width);
  WithNumbers(a.x.dtype, [&](auto type) {
    for (int64_t unit = begin; unit < end; ++unit) {
      if constexpr (kForward) {
        ForwardUnit<decltype(type)>(a, unit, room);
      } else {
        BackwardUnit<decltype(type)>(a, unit, room);
      }
    }
  });
}

}  // namespace

inline void causal_conv1d_forward(const ConvArgs& a, int64_t begin, int64_t end) {
  Units<true>(a, begin, end);
}

inline void causal_conv1d_backward(const ConvArgs& a, int64_t begin, int64_t end) {
  Units<false>(a, begin, end);
}

}  // namespace pd::PD_NAMESPACE
