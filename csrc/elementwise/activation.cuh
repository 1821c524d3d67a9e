// Activations of gates, in fp32:
//
//   silu(g) = g / (1 + e^-g)   gelu(g) = g * Phi(g)   gelu_tanh(g) = g/2 * (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))
#pragma once

#include "arch/vec.cuh"
#include "elementwise/gated_activation.h"

namespace fastattn {

template <Activation ACTIVATION>
__device__ __forceinline__ float activate(float g) {
  if constexpr (ACTIVATION == Activation::kSilu) return __fdividef(g, 1.0f + __expf(-g));
  // Phi through erfc: 1 + erf(g / sqrt(2)) would cancel for negative g.
  if constexpr (ACTIVATION == Activation::kGelu) return 0.5f * g * erfcf(-0.70710678118654752f * g);
  if constexpr (ACTIVATION == Activation::kGeluTanh) {
    return 0.5f * g * (1.0f + tanhf(0.79788456080286536f * (g + 0.044715f * g * g * g)));
  }
}

// act(gate) * up, rounded.
template <Activation ACTIVATION, typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> gated(const Pack<T, VEC>& gate, const Pack<T, VEC>& up) {
  float gates[VEC], ups[VEC];
  unpack(gate, gates);
  unpack(up, ups);
#pragma unroll
  for (int i = 0; i < VEC; ++i) ups[i] *= activate<ACTIVATION>(gates[i]);
  return packed<T>(ups);
}

// The same, with an activation that the call brings.
template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> gated(Activation activation, const Pack<T, VEC>& gate, const Pack<T, VEC>& up) {
  if (activation == Activation::kSilu) return gated<Activation::kSilu>(gate, up);
  if (activation == Activation::kGeluTanh) return gated<Activation::kGeluTanh>(gate, up);
  return gated<Activation::kGelu>(gate, up);
}

}  // namespace fastattn
