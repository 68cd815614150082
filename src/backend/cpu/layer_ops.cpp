// The fused decoder-layer calls on the CPU: the caller's 16-bit tensors in and out, float32
// between. They walk the program of the layer's spec.
#include "backend/layer_ops.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <vector>

#include "backend/cpu/kernels.hpp"
#include "backend/cpu/layer_attention.hpp"
#include "backend/cpu/layer_rows.hpp"
#include "backend/cpu/narrow.hpp"

namespace clusterfusion::cpu {
namespace {

// Weights of one task of a product.
constexpr std::int64_t kTaskBytes = 256 << 10;

// out = weights in + bias, then the epilogue.
struct Linear {
  Matrix weights;
  Rows bias;  // one row; empty: none
  const Rows& in;
  Rows& out;
  Activation activation = Activation::identity;
  const Rows* gate = nullptr;  // what each result is multiplied by, or none
};

// Products of as many rows, each of which may take up, value by value, what those before it gave.
using Job = std::vector<Linear>;

void compute(const Linear& linear, std::int64_t rows, std::int64_t begin, std::int64_t end) {
  Product product;
  product.weights = linear.weights;
  product.in = linear.in.row(0);
  product.in_stride = linear.in.stride();
  product.tokens = rows;
  product.out = linear.out.row(0);
  product.out_stride = linear.out.stride();
  product.bias = linear.bias.empty() ? nullptr : linear.bias.row(0);
  multiply(product, begin, end);
  for (std::int64_t row = 0; row < rows; ++row) {
    float* out = linear.out.row(row);
    activate(linear.activation, out + begin, end - begin);
    if (linear.gate == nullptr) continue;
    const float* gate = linear.gate->row(row);
    for (std::int64_t i = begin; i < end; ++i) out[i] *= gate[i];
  }
}

void compute_all(std::span<const Job> jobs, std::int64_t rows) {
  struct Task {
    const Job* job;
    std::int64_t begin, end;
  };
  std::vector<Task> tasks;
  for (const Job& job : jobs) {
    std::int64_t row_bytes = 0;
    for (const Linear& linear : job) {
      row_bytes += linear.weights.cols * size_of(linear.weights.dtype);
    }
    const std::int64_t groups = kTaskBytes / row_bytes / kRowGroup;
    const std::int64_t step = std::max<std::int64_t>(groups, 1) * kRowGroup;
    const std::int64_t end = job[0].weights.rows;
    for (std::int64_t row = 0; row < end; row += step) {
      tasks.push_back({&job, row, std::min(row + step, end)});
    }
  }
  run_tasks(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    for (const Linear& linear : *task.job) compute(linear, rows, task.begin, task.end);
  });
}

// Runs a part of the layer's program. What its steps add to the residual stream stays apart,
// because the calls hand it on.
class LayerRun {
 public:
  explicit LayerRun(const LayerWork& work) : work_(work), spec_(work.spec) {
    at(plan::Place::residual) = Rows(work.dtype, work.input, work.rows, spec_.hidden_size);
  }

  Rows& at(plan::Place place) { return places_[static_cast<std::size_t>(place)]; }
  Rows attention, mlp;  // what each half adds

  void run(const RowPositions& positions) {
    program_ = plan::make_layer_program(spec_, work_.part);
    for (const std::span<const plan::Step> phase : plan::phases_of(program_)) {
      switch (phase[0].operation) {
        case plan::Operation::norm:
          for (const plan::Step& step : phase) normalize(step);
          break;
        case plan::Operation::product: multiply_all(phase); break;
        case plan::Operation::attention: attend(phase[0], positions);
      }
    }
  }

  // The residual stream with what attention and, if there is any, the MLP add to it. In this order
  // everywhere, so that halves give what the whole gives but for their rounding.
  void add_up(std::int64_t row, float* out) const {
    const float* x = places_[static_cast<std::size_t>(plan::Place::residual)].row(row);
    for (std::int64_t i = 0; i < spec_.hidden_size; ++i) {
      out[i] = x[i] + attention.row(row)[i];
      if (!mlp.empty()) out[i] += mlp.row(row)[i];
    }
  }

 private:
  // One row; empty if absent.
  Rows vector(LayerTensor tensor, std::int64_t count) const {
    const void* values = work_.weight(tensor);
    return values == nullptr ? Rows() : Rows(work_.dtype, values, 1, count);
  }

  void normalize(const plan::Step& step) {
    const std::int64_t hidden = spec_.hidden_size;
    const auto eps = static_cast<float>(spec_.layer_norm_eps);
    const Rows weight = vector(step.weight, hidden);
    const Rows bias = vector(bias_of(step.weight), hidden);
    const bool follows_attention = step.of_mlp && !spec_.parallel_residual;
    std::vector<float> sum(static_cast<std::size_t>(follows_attention ? hidden : 0));
    Rows& out = at(step.output) = Rows(work_.rows, hidden);
    for (std::int64_t row = 0; row < work_.rows; ++row) {
      const float* x = at(step.input).row(row);
      if (follows_attention) {
        add_up(row, sum.data());
        x = sum.data();
      }
      if (spec_.norm == NormKind::rms_norm) {
        rms_norm(x, weight.row(0), eps, hidden, out.row(row));
      } else {
        layer_norm(x, weight.row(0), bias.row(0), eps, hidden, out.row(row));
      }
    }
  }

  // Those that take up another's results belong to its job.
  void multiply_all(std::span<const plan::Step> phase) {
    std::vector<Job> jobs;
    std::vector<const plan::Step*> first_of;  // of each job
    for (const plan::Step& step : phase) {
      std::size_t job = 0;
      while (job < jobs.size() &&
             !step.waits_for(static_cast<std::size_t>(first_of[job] - program_.data()))) {
        ++job;
      }
      if (job == jobs.size()) {
        jobs.emplace_back();
        first_of.push_back(&step);
      }
      jobs[job].push_back(linear(step));
    }
    compute_all(jobs, work_.rows);
  }

  Linear linear(const plan::Step& step) {
    const bool adds = step.epilogue == plan::Epilogue::add_to_output;
    Rows& out = !adds ? at(step.output) : step.of_mlp ? mlp : attention;
    const std::int64_t width = plan::width_of(step.output, spec_);
    out = Rows(work_.rows, width);
    const bool activates = step.epilogue == plan::Epilogue::activate;
    return {{static_cast<const std::byte*>(work_.weight(step.weight)), work_.dtype, width,
             plan::width_of(step.input, spec_)},
            vector(bias_of(step.weight), width),
            at(step.input),
            out,
            activates ? spec_.activation : Activation::identity,
            step.epilogue == plan::Epilogue::times_gate ? &at(plan::Place::gate) : nullptr};
  }

  void attend(const plan::Step& step, const RowPositions& positions) {
    ProjectedHeads in;
    if (step.input == plan::Place::qkv) {
      in.qkv = &at(plan::Place::qkv);
    } else {
      in.queries = &at(plan::Place::queries);
      in.keys = &at(plan::Place::keys);
      in.values = &at(plan::Place::values);
    }
    Rows& out = at(plan::Place::heads) = Rows(work_.rows, spec_.attention_size());
    attend_rows(work_, positions, in, out);
  }

  const LayerWork& work_;
  const LayerSpec& spec_;
  plan::LayerProgram program_;
  std::array<Rows, plan::kNumPlaces> places_;
};

// Rounds a row's values to their place in a result of rows; NaN for all if there is none.
void give(const LayerWork& work, void* result, std::int64_t row, const float* values,
          std::int64_t width) {
  void* to = static_cast<std::byte*>(result) + row * width * size_of(work.dtype);
  if (values != nullptr) return narrow(work.dtype, values, width, to);
  const std::vector<float> none(static_cast<std::size_t>(width),
                                std::numeric_limits<float>::quiet_NaN());
  narrow(work.dtype, none.data(), width, to);
}

}  // namespace

void run_layer(const LayerWork& work) {
  const LayerSpec& spec = work.spec;
  const bool attends = work.part != plan::Part::mlp_down;
  const RowPositions positions = attends ? RowPositions(work) : RowPositions();
  LayerRun layer(work);
  if (!attends) {
    layer.attention = Rows(work.dtype, work.attn_output, work.rows, spec.hidden_size);
    layer.at(plan::Place::mlp) =
        Rows(work.dtype, work.mlp_intermediate, work.rows, spec.intermediate_size);
  }
  layer.run(positions);
  std::vector<float> sum(static_cast<std::size_t>(spec.hidden_size));
  for (std::int64_t row = 0; row < work.rows; ++row) {
    const bool is_inside = !attends || positions.is_inside(row);
    if (!is_inside) {
      give(work, work.k_new, row, nullptr, spec.kv_size());
      give(work, work.v_new, row, nullptr, spec.kv_size());
    }
    if (work.part == plan::Part::attention_and_mlp_up) {
      const float* intermediate = layer.at(plan::Place::mlp).row(row);
      give(work, work.attn_output, row, is_inside ? layer.attention.row(row) : nullptr,
           spec.hidden_size);
      give(work, work.mlp_intermediate, row, is_inside ? intermediate : nullptr,
           spec.intermediate_size);
    } else {
      layer.add_up(row, sum.data());
      give(work, work.output, row, is_inside ? sum.data() : nullptr, spec.hidden_size);
    }
  }
}

}  // namespace clusterfusion::cpu
