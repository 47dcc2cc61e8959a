// How far apart two scores, in units of tau, must be for sigmoid of their difference to be 0 or 1 to working precision.
#pragma once

#include "core/macros.h"

namespace shiva {

template <typename T>
struct SigmoidWindow;

// 1 - sigmoid(17.4) = 2.8e-8 is less than half an ulp of 1 in float32.
template <>
struct SigmoidWindow<float> {
  static constexpr float kReach = 17.4f;
  // A block of sorted scores may span this many tau: with the reach on both sides exp stays within e^(+-26).
  static constexpr float kBlockSpan = 16.0f;
};

template <>
struct SigmoidWindow<double> {
  static constexpr double kReach = 37.5;
  static constexpr double kBlockSpan = 16.0;
};

}  // namespace shiva
