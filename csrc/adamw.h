// The arithmetic of a clipped step of AdamW, for one value or a vector of them: what the kernels of
// the CPU and of CUDA share. Spec: lorakern/adamw.py

#pragma once

#include <cmath>

#ifdef __CUDACC__
#define LORAKERN_BOTH __host__ __device__ __forceinline__
#else
#define LORAKERN_BOTH inline
#endif

namespace lorakern {

// Of one segment, without its learning rate
struct Hyper {
  double weight_decay, beta1, beta2, eps;
};

// The numbers that an element meets: T is float, or a vector of equal ones
template <typename T>
struct Rates {
  // times g; times p; for m of g - m; times v, times g²; times √v, beside it; times m / √v; for the
  // average of p less it
  T clip, decay, to_g, beta2, one_beta2, unbias, eps, rate, to_p;

  template <typename U>
  LORAKERN_BOTH Rates<U> as() const {
    return {U(clip),      U(decay),  U(to_g), U(beta2), U(one_beta2),
            U(unbias),    U(eps),    U(rate), U(to_p)};
  }
};

LORAKERN_BOTH bool is_finite(double x) { return x - x == 0; }

// What brings gradients of this norm down to `largest`
LORAKERN_BOTH double clip_factor(double norm, double largest) {
  const double factor = largest / (norm + 1e-6);
  return factor < 1 ? factor : 1;
}

// step: counted from 1; memory: of the average
LORAKERN_BOTH Rates<float> rates_of(const Hyper& h, double lr, double step, double clip,
                                    double memory) {
  const double first = (1 + step) / (10 + step), keep = first < memory ? first : memory;
  const Rates<double> rates{clip,
                            1 - lr * h.weight_decay,
                            1 - h.beta1,
                            h.beta2,
                            1 - h.beta2,
                            1 / sqrt(1 - pow(h.beta2, step)),
                            h.eps,
                            lr / (1 - pow(h.beta1, step)),
                            1 - keep};
  return rates.as<float>();
}

// m and v after a gradient g
template <typename T>
LORAKERN_BOTH void add_gradient(T& m, T& v, T g, const Rates<T>& rates) {
  g = g * rates.clip;
  m = m + rates.to_g * (g - m);
  v = rates.beta2 * v + rates.one_beta2 * (g * g);
}

// p after a step by these m and √v
template <typename T>
LORAKERN_BOTH T stepped(T p, T m, T root_v, const Rates<T>& rates) {
  return p * rates.decay - rates.rate * (m / (root_v * rates.unbias + rates.eps));
}

}  // namespace lorakern
