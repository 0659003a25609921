// logit_mix, mix_argmax, mix_sample and mix_verify for Python. Pointers arrive as integers; see
// bindings.cpp.
#include <tuple>

#include "bind.h"
#include "mix_sample_driver.h"
#include "mix_verify_driver.h"

namespace {

// (pointer, row stride in elements, width, dtype) of the base and of every memory.
using Inputs = std::vector<std::tuple<uintptr_t, int64_t, int64_t, int>>;
// (pointer or 0, stride between rows, stride between memories) of per-row weights.
using RowWeights = std::tuple<uintptr_t, int64_t, int64_t>;

mdk::MixArgs mix_args(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                      const RowWeights& row_weights, double memory_temperature) {
  mdk::MixArgs args;
  args.rows = rows;
  args.width = 0;
  for (const auto& [logits, stride, width, dtype] : inputs) {
    const double scale = args.inputs.empty() ? 1.0 : 1.0 / memory_temperature;
    const int64_t bytes = dtype == MDK_F32 ? 4 : 2;
    args.inputs.push_back(
        {pointer<char>(logits), stride * bytes, width, dtype, static_cast<float>(scale)});
    if (width > args.width) args.width = width;
  }
  args.weights = std::move(weights);
  args.row_weights = pointer<float>(std::get<0>(row_weights));
  args.weight_stride = std::get<1>(row_weights);
  args.weight_step = std::get<2>(row_weights);
  return args;
}

py::object logit_mix(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                     const RowWeights& row_weights, double memory_temperature, bool base_scale,
                     uintptr_t out, int64_t out_stride, int threads) {
  const auto args = mix_args(rows, inputs, std::move(weights), row_weights, memory_temperature);
  mdk::Fault fault;
  {
    py::gil_scoped_release release;
    fault = mdk::logit_mix(args, base_scale, pointer<float>(out), out_stride, threads);
  }
  return report(fault);
}

py::object mix_argmax(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                      const RowWeights& row_weights, double memory_temperature, uintptr_t ids,
                      int threads) {
  const auto args = mix_args(rows, inputs, std::move(weights), row_weights, memory_temperature);
  mdk::Fault fault;
  {
    py::gil_scoped_release release;
    fault = mdk::mix_argmax(args, pointer<int64_t>(ids), threads);
  }
  return report(fault);
}

py::object mix_sample(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                      const RowWeights& row_weights, double memory_temperature, double temperature,
                      int64_t top_k, double top_p, double min_p, uintptr_t seeds, uintptr_t offsets,
                      uintptr_t tokens, int threads) {
  const auto args = mix_args(rows, inputs, std::move(weights), row_weights, memory_temperature);
  const mdk::MixSampleArgs sample = {temperature,
                                     {top_k, top_p, min_p},
                                     pointer<int64_t>(seeds),
                                     pointer<int64_t>(offsets),
                                     pointer<int64_t>(tokens)};
  mdk::Fault fault;
  {
    py::gil_scoped_release release;
    fault = mdk::mix_sample(args, sample, threads);
  }
  return report(fault);
}

py::object mix_choose(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                      const RowWeights& row_weights, double memory_temperature, uintptr_t seeds,
                      uintptr_t offsets, uintptr_t out) {
  const auto args = mix_args(rows, inputs, std::move(weights), row_weights, memory_temperature);
  return report(mdk::mix_choose(args, pointer<int64_t>(seeds), pointer<int64_t>(offsets),
                                pointer<float>(out)));
}

void mix_logprobs(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                  const RowWeights& row_weights, double memory_temperature, uintptr_t tokens,
                  uintptr_t out, int threads) {
  const auto args = mix_args(rows, inputs, std::move(weights), row_weights, memory_temperature);
  py::gil_scoped_release release;
  mdk::mix_logprobs(args, pointer<int64_t>(tokens), pointer<float>(out), threads);
}

py::object mix_verify(int64_t rows, const Inputs& inputs, std::vector<double> weights,
                      const RowWeights& row_weights, double memory_temperature, int64_t positions,
                      int draft, double draft_temperature, uintptr_t draft_ids,
                      uintptr_t draft_lengths, double temperature, int64_t top_k, double top_p,
                      double min_p, uintptr_t seeds, uintptr_t offsets, uintptr_t num_accepted,
                      uintptr_t tokens, int threads) {
  auto args = mix_args(rows, inputs, std::move(weights), row_weights, memory_temperature);
  args.inputs[draft].scale = static_cast<float>(1.0 / draft_temperature);
  const mdk::MixVerifyArgs verify = {positions,
                                     draft,
                                     pointer<int64_t>(draft_ids),
                                     pointer<int64_t>(draft_lengths),
                                     temperature,
                                     {top_k, top_p, min_p},
                                     pointer<int64_t>(seeds),
                                     pointer<int64_t>(offsets),
                                     pointer<int64_t>(num_accepted),
                                     pointer<int64_t>(tokens)};
  mdk::Fault fault;
  {
    py::gil_scoped_release release;
    fault = mdk::mix_verify(args, verify, threads);
  }
  return report(fault);
}

}  // namespace

void bind_mix(py::module_& m) {
  m.def("logit_mix", &logit_mix);
  m.def("mix_argmax", &mix_argmax);
  m.def("mix_sample", &mix_sample);
  m.def("mix_choose", &mix_choose);
  m.def("mix_logprobs", &mix_logprobs);
  m.def("mix_verify", &mix_verify);
}
