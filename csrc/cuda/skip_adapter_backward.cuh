// The backward kernel of skip_adapter that goes over row tiles; skip_adapter.cu says how its work is laid out.

#pragma once

#include "skip_adapter_rows.cuh"

namespace fast_prompt::cuda::skip {
namespace {

// What the row tiles read and write besides the problem; what is written is null where not wanted. dv is the gradient
// of v = s (W_u t + b_u): the result's own, but for a norm after the adapter. Sums over rows come in parts, in order of
// row tiles; `norms`, `up_operand` and `down_operand` are what the weights' gradients are made of.
template <class T>
struct RowGradients {
  Matrix<T> derivative, grad;  // dv; the result's gradient
  const T* hidden;             // [rows, adapter_width]
  T* x;                        // [rows, width]
  T* up_operand;               // [rows, up_pitch]: t, each group's expert after expert and times its gate
  T* down_operand;             // [rows, down_pitch]: dh
  RowNorm* norms;              // [rows]
  float* hidden_sums;          // [row tiles, ROW_WARPS, adapter_width], of dh
  float* expert_sums;          // [row tiles, WARPS, experts], of dv . W_u t for each expert, without its gate
  float* result_sums;          // [row tiles, WARPS, width], of dv
  float* norm_sums;            // [row tiles, WARPS, 2, width], of grad * (x - mean) / deviation, and of grad
  const float* weighted_sums;  // [2, adapter_width] for each adapter: sum_k W_d norm_weight, b_d + sum_k W_d norm_bias
  int up_pitch, down_pitch;

  __device__ bool needs_grad_of_z() const { return x || norm_sums; }
};

template <class T, class L>
constexpr int64_t backward_shared_bytes(const Problem<T>& problem) {
  const int64_t operand = L::ROWS * int64_t{group_pitch(problem.adapter_width) + PADDING<T>};
  return (L::STAGES * int64_t{L::template STAGE<T>(2)} + operand) * static_cast<int64_t>(sizeof(T)) +
         L::ROWS * 4 * sizeof(float);
}

// The columns of the up weight that a product dv W_u has for its result: of one group and one expert.
struct UpColumns {
  int group, first, expert;  // first: of the expert's columns
};

// The chunks that have columns of a group.
template <class T>
__device__ inline int begin_chunk(const Problem<T>& problem, int group) {
  return group * problem.group_width / CHUNK<T>;
}
template <class T>
__device__ inline int end_chunk(const Problem<T>& problem, int group) {
  return static_cast<int>(ceil_div((group + 1) * problem.group_width, CHUNK<T>));
}

// [CHUNK, COLUMNS] of the up weight; zeros for rows of other groups and columns of other experts.
template <class T, class L>
__device__ inline void load_expert(T* tile, const Problem<T>& problem, int adapter, int chunk,
                                   const UpColumns& columns) {
  const int group_width = problem.group_width, first_row = chunk * CHUNK<T>;
  const int expert_column = columns.expert * problem.expert_width;
  const bool aligned = problem.aligned && expert_column % PADDING<T> == 0;
  load_tile<CHUNK<T>, L::COLUMNS, L::THREADS>(
      tile, L::template WIDE_PITCH<T>, problem.weight(problem.up_weight, adapter), first_row,
      (columns.group + 1) * group_width, expert_column + columns.first, expert_column + problem.expert_width, aligned,
      threadIdx.x, [&](int row) { return first_row + row < columns.group * group_width; });
}

// Loads, for each row tile, for each group's hidden columns, block by block and expert by expert, the group's chunks of
// dv and of the up weight; then, chunk by chunk, the down weight block by block, with the rows of x and of the
// gradient.
template <class T, class L>
class BackwardLoader {
  const Problem<T>& problem;
  const RowGradients<T>& gradients;
  RowTile<T, L> tile;
  UpColumns columns{0, 0, 0};
  bool up = true;
  int chunk = 0, block = 0;

 public:
  __device__ BackwardLoader(const Problem<T>& problem, const RowGradients<T>& gradients)
      : problem(problem), gradients(gradients), tile(problem) {}

  __device__ void load(T* stage) {
    if (!tile.exists()) return;
    T* const norms = stage + L::template WEIGHTS<T>;
    T* const rows = norms + L::template NORMS<T>;
    const bool last = !up && block == L::blocks(problem.adapter_width) - 1, normed = last && problem.normed_before();
    if (up || normed) load_rows<T, L>(rows, problem, up ? gradients.derivative : problem.x, tile, chunk);
    if (normed) load_norm<T, L>(norms, problem, tile.adapter, chunk);
    if (last) load_rows<T, L>(rows + L::template TILE<T>, problem, gradients.grad, tile, chunk);
    if (up) {
      load_expert<T, L>(stage, problem, tile.adapter, chunk, columns);
      advance_up();
    } else {
      load_down_weight<T, L>(stage, problem, tile.adapter, block, chunk);
      advance_down();
    }
  }

 private:
  __device__ void restart() {
    up = true;
    chunk = 0;
    tile.advance();
  }

  __device__ void advance_down() {
    if (++block < L::blocks(problem.adapter_width)) return;
    block = 0;
    if (++chunk == problem.chunks()) restart();
  }

  __device__ void advance_up() {
    if (++chunk < end_chunk(problem, columns.group)) return;
    if (++columns.expert == problem.experts) {
      columns.expert = 0;
      if ((columns.first += L::COLUMNS) >= problem.expert_width) {
        columns.first = 0;
        if (++columns.group == problem.groups) {
          columns.group = 0;
          up = false;
        }
      }
    }
    chunk = up ? begin_chunk(problem, columns.group) : 0;
    if (!up && !gradients.needs_grad_of_z()) restart();
  }
};

// A block's shared memory, and where its threads are.
template <class T, class L>
struct BackwardBlock {
  const Problem<T>& problem;
  const RowGradients<T>& gradients;
  const Place<L> place;
  const int pitch;  // of the operand, dh
  T *stages, *operand;
  float *norms, *row_sums;  // [ROWS, 2] each: mean and 1 / deviation; the sums that the norm's backward needs

  __device__ BackwardBlock(const Problem<T>& problem, const RowGradients<T>& gradients)
      : problem(problem), gradients(gradients), pitch(group_pitch(problem.adapter_width) + PADDING<T>) {
    stages = reinterpret_cast<T*>(ptx::dynamic_shared());
    operand = stages + L::STAGES * L::template STAGE<T>(2);
    norms = reinterpret_cast<float*>(operand + L::ROWS * pitch);
    row_sums = norms + 2 * L::ROWS;
  }

  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int warp_column() const { return place.column_warp * L::template WARP_CHUNK<T>; }
};

// Statistics of the tile's rows; with the residual that adds the normed rows, also the sums over a row of grad * weight
// and of that times the normed x. A barrier must follow.
template <class T, class L>
__device__ inline void measure_rows(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile) {
  const Problem<T>& problem = block.problem;
  const Matrix<T>& grad = block.gradients.grad;
  const int first = threadIdx.x % 8 * PADDING<T>;
  for (int row = threadIdx.x / 8; row < L::ROWS; row += L::THREADS / 8) {
    const int64_t global_row = tile.first_row + row;
    const bool inside = global_row < tile.end_row;
    const auto read = [&](const Matrix<T>& matrix, int64_t matrix_row, int chunk) {
      const int column = chunk * CHUNK<T> + first, left = inside ? problem.width - column : 0;
      return read_piece(matrix.data + (left > 0 ? matrix.offset(matrix_row) + column : 0),
                        left < PADDING<T> ? left : PADDING<T>, problem.aligned);
    };
    const RowNorm norm =
        measure_row(problem, threadIdx.x % 8, [&](int chunk) { return read(problem.x, global_row, chunk); });
    float slope = 0, moment = 0;
    for (int chunk = 0; problem.residual == SkipResidual::NORMED && chunk < problem.chunks(); ++chunk) {
      const Piece<T> x = read(problem.x, global_row, chunk), g = read(grad, global_row, chunk);
      const Piece<T> weight = read(problem.norm_weight, tile.adapter, chunk);
#pragma unroll
      for (int i = 0; i < PADDING<T>; ++i) {
        const float product = to_float(g.element[i]) * to_float(weight.element[i]);
        slope += product;
        moment += product == 0 ? 0 : product * norm(to_float(x.element[i]));
      }
    }
    slope = reduce_lanes<7>(slope, Add());
    moment = reduce_lanes<7>(moment, Add());
    if (first != 0) continue;
    const float values[4] = {norm.mean, norm.rstd, slope, moment};
    for (int i = 0; i < 2; ++i) {
      block.norms[2 * row + i] = values[i];
      block.row_sums[2 * row + i] = values[2 + i];
    }
    if (block.gradients.norms && inside) block.gradients.norms[global_row] = norm;
  }
}

// A warp's part of the sums over the tile's rows of value(row, column) for each column of a chunk.
template <class T, class L, class Value>
__device__ inline void sum_columns(const BackwardBlock<T, L>& block, float* sums, int chunk, Value value) {
#pragma unroll
  for (int column = block.place.lane; column < CHUNK<T>; column += 32) {
    float sum = 0;
    for (int row = block.warp(); row < L::ROWS; row += L::WARPS) sum += value(row, column);
    if (chunk * CHUNK<T> + column < block.problem.width) sums[chunk * CHUNK<T> + column] = sum;
  }
}

// ---- From dv to dh ----

// products = dv W_u for the columns of one group and expert.
template <class T, class L, class Weights>
__device__ inline void expert_product(const BackwardBlock<T, L>& block, Weights& weights, const RowTile<T, L>& tile,
                                      const UpColumns& columns, Sums<L::M, L::N>& products) {
  const Problem<T>& problem = block.problem;
  const Place<L>& place = block.place;
  const bool first = columns.first == 0 && columns.expert == 0;
  float* const sums = block.gradients.result_sums + (tile.index * L::WARPS + block.warp()) * problem.width;
  for (int chunk = begin_chunk(problem, columns.group); chunk < end_chunk(problem, columns.group); ++chunk) {
    const T* const stage = weights.next();
    const T* const rows = stage + L::template WEIGHTS<T> + L::template NORMS<T>;
    multiply_by_columns(products, rows + place.first_row * PITCH<T>, PITCH<T>, stage + place.first_column,
                        L::template WIDE_PITCH<T>, CHUNK<T>, place.lane);
    if (first && block.gradients.result_sums && problem.first_group(chunk) == columns.group)
      sum_columns(block, sums, chunk, [&](int row, int column) { return to_float(rows[row * PITCH<T> + column]); });
  }
}

// The first hidden column of such columns, and how many follow in the group.
template <class T>
__device__ inline int first_hidden(const Problem<T>& problem, const UpColumns& columns) {
  return columns.group * problem.expert_width + columns.first;
}
template <class T>
__device__ inline int hidden_left(const Problem<T>& problem, const UpColumns& columns) {
  return problem.expert_width - columns.first;
}

// Fills a warp's part of a block of hidden columns, in the operand, with value(h, keep, row, column): what is made of
// the hidden element that was kept, dropout or not. Rows beyond the tile's are zeros.
template <class T, class L, class Value>
__device__ inline void fill_hidden(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile,
                                   const UpColumns& columns, Value value) {
  const Problem<T>& problem = block.problem;
  const int first_column = first_hidden(problem, columns), left = hidden_left(problem, columns);
  for_each_hidden(block.place, [&](int row, int block_column) {
    const int64_t global_row = tile.first_row + row;
    const int column = first_column + block_column;
    const int64_t kept_row = problem.first_adapter * problem.rows + global_row;
    const T* const hidden = block.gradients.hidden + global_row * problem.adapter_width + column;
    float factor[4];
    dropout_factors(problem, kept_row * problem.adapter_width + column, factor);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (block_column + i >= left) continue;
      const bool inside = global_row < tile.end_row;
      assign(block.operand[row * block.pitch + column + i],
             inside ? value(to_float(hidden[i]), factor[i], global_row, column + i) : 0);
    }
  });
  __syncwarp();
}

// Calls body(sum, element, slot, column) for a thread's sums of a block of hidden columns and what is in the operand
// there.
template <class T, class L, class Body>
__device__ inline void with_operand(const BackwardBlock<T, L>& block, const UpColumns& columns,
                                    Sums<L::M, L::N>& sums, Body body) {
  const Place<L>& place = block.place;
  const int first_column = first_hidden(block.problem, columns), left = hidden_left(block.problem, columns);
  for_each_pair(sums, place.pair, [&](float& first, float& second, int slot, int column) {
    const int within = place.first_column + column;
    T* const element = block.operand + place.row(slot) * block.pitch + first_column + within;
    if (within < left) body(first, element[0]);
    if (within + 1 < left) body(second, element[1]);
  });
}

// t of a block of hidden columns, in the operand and handed on.
template <class T, class L>
__device__ inline void fill_activations(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile,
                                        const UpColumns& columns) {
  const Problem<T>& problem = block.problem;
  const RowGradients<T>& gradients = block.gradients;
  fill_hidden(block, tile, columns, [&](float h, float factor, int64_t row, int column) {
    const float t = dropped(activate(problem.activation, h), factor);
    if (gradients.up_operand)
      write_operand(problem, gradients.up_operand + row * gradients.up_pitch + operand_column(problem, column),
                    tile.sample, t);
    return t;
  });
}

// Adds up, for one expert, dv . W_u t over the tile's rows, from its dv W_u; a warp's part.
template <class T, class L>
__device__ inline void sum_expert(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile,
                                  const UpColumns& columns, Sums<L::M, L::N>& products) {
  float sum = 0;
  with_operand(block, columns, products, [&](float product, const T& t) { sum += product * to_float(t); });
  sum = reduce_lanes<31>(sum, Add());
  float& part =
      block.gradients.expert_sums[(tile.index * L::WARPS + block.warp()) * block.problem.experts + columns.expert];
  if (block.place.lane == 0) part = sum + (columns.group == 0 && columns.first == 0 ? 0 : part);
}

// Turns a block's gradients of t into dh, in the operand, and a warp's part of its sums over the tile's rows.
template <class T, class L>
__device__ inline void finish_hidden(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile,
                                     const UpColumns& columns, Sums<L::M, L::N>& sums) {
  const Problem<T>& problem = block.problem;
  const Place<L>& place = block.place;
  fill_hidden(block, tile, columns, [&](float h, float factor, int64_t, int) {
    return factor == 0 ? 0 : activation_slope(problem.activation, h);
  });
  const float scale = problem.scale_of(tile.adapter) * problem.kept_scale;
  with_operand(block, columns, sums, [&](float& dh, T& element) {
    dh = dropped(scale * dh, to_float(element));
    assign(element, dh);
  });
  if (!block.gradients.hidden_sums) return;
  const int64_t part = tile.index * L::ROW_WARPS + place.first_row / (L::M * 16);
  float* const parts = block.gradients.hidden_sums + part * problem.adapter_width + first_hidden(problem, columns);
#pragma unroll
  for (int i = 0; i < 2 * L::N; ++i) {
    const int within = place.first_column + i / 2 * 8 + place.pair * 2 + i % 2;
    float sum = 0;
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) sum += sums.at[slot / 2][i / 2][slot % 2 * 2 + i % 2];
    sum = sum_groups(sum);
    if (place.group == 0 && within < hidden_left(problem, columns)) parts[within] = sum;
  }
}

// dh for all hidden columns of the tile.
template <class T, class L, class Weights>
__device__ inline void differentiate_hidden(const BackwardBlock<T, L>& block, Weights& weights,
                                            const RowTile<T, L>& tile) {
  const Problem<T>& problem = block.problem;
  for (int group = 0; group < problem.groups; ++group)
    for (int first = 0; first < problem.expert_width; first += L::COLUMNS) {
      if (block.gradients.up_operand || block.gradients.expert_sums) fill_activations(block, tile, {group, first, 0});
      Sums<L::M, L::N> sums;
      for (int expert = 0; expert < problem.experts; ++expert) {
        Sums<L::M, L::N> products;
        expert_product(block, weights, tile, {group, first, expert}, products);
        if (block.gradients.expert_sums) sum_expert(block, tile, {group, first, expert}, products);
        const float gate = problem.gates ? problem.gates[tile.sample * problem.experts + expert] : 1;
#pragma unroll
        for (int m = 0; m < L::M; ++m)
#pragma unroll
          for (int n = 0; n < L::N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.at[m][n][i] += gate * products.at[m][n][i];
      }
      finish_hidden(block, tile, {group, first, 0}, sums);
    }
}

// What is made of dh once all of it is in the operand: a copy for the down weight's gradient, and for the norm's
// backward the sums over a row of dz * weight, and of that times the normed x, which need no dz: dz being W_d^T dh,
// they are those of dh times sums of W_d, and of dh times h. A barrier before and after.
template <class T, class L>
__device__ inline void pass_hidden_on(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile) {
  const Problem<T>& problem = block.problem;
  const RowGradients<T>& gradients = block.gradients;
  const int width = problem.adapter_width;
  __syncthreads();
  const int pieces = gradients.down_pitch / PADDING<T>;
  for (int i = threadIdx.x; gradients.down_operand && i < L::ROWS * pieces; i += L::THREADS) {
    const int row = i / pieces, column = i % pieces * PADDING<T>;
    if (tile.first_row + row < tile.end_row)
      *reinterpret_cast<Piece<T>*>(gradients.down_operand + (tile.first_row + row) * gradients.down_pitch + column) =
          *reinterpret_cast<const Piece<T>*>(block.operand + row * block.pitch + column);
  }
  const float* const weighted = gradients.weighted_sums + int64_t{tile.adapter} * 2 * width;
  const float per_element = 1.0f / static_cast<float>(problem.width);
  for (int row = threadIdx.x / 8; problem.normed_before() && row < L::ROWS; row += L::THREADS / 8) {
    const T* const hidden = gradients.hidden + (tile.first_row + row) * width;
    float slope = 0, moment = 0;
    for (int column = threadIdx.x % 8; column < width && tile.first_row + row < tile.end_row; column += 8) {
      const float dh = to_float(block.operand[row * block.pitch + column]);
      slope += dh * weighted[column];
      moment += dh * (to_float(hidden[column]) - weighted[width + column]);
    }
    slope = reduce_lanes<7>(slope, Add());
    moment = reduce_lanes<7>(moment, Add());
    if (threadIdx.x % 8 != 0) continue;
    float* const sums = block.row_sums + 2 * row;
    sums[0] = problem.norm == SkipNorm::LAYER ? (sums[0] + slope) * per_element : 0;
    sums[1] = (sums[1] + moment) * per_element;
  }
  __syncthreads();
}

// ---- From dh to dx ----

// The sums over the tile's rows that the norm's weight and bias need where the normed rows are added to the result.
template <class T, class L>
__device__ inline void sum_norm_gradients(const BackwardBlock<T, L>& block, const RowTile<T, L>& tile, int chunk,
                                          const T* x, const T* grad) {
  const int width = block.problem.width;
  float* const sums = block.gradients.norm_sums + (tile.index * L::WARPS + block.warp()) * 2 * width;
  sum_columns(block, sums, chunk, [&](int row, int column) {
    if (tile.first_row + row >= tile.end_row) return 0.0f;
    const RowNorm norm{block.norms[2 * row], block.norms[2 * row + 1]};
    return to_float(grad[row * PITCH<T> + column]) * norm(to_float(x[row * PITCH<T> + column]));
  });
  sum_columns(block, sums + width, chunk, [&](int row, int column) { return to_float(grad[row * PITCH<T> + column]); });
  __syncthreads();  // the result takes the gradient's place
}

// dz = W_d^T dh (+ the result's gradient), and dx from it, chunk by chunk.
template <class T, class L, class Weights>
__device__ inline void differentiate_rows(const BackwardBlock<T, L>& block, Weights& weights,
                                          const RowTile<T, L>& tile) {
  const Problem<T>& problem = block.problem;
  const Place<L>& place = block.place;
  const bool normed = problem.normed_before();
  for (int chunk = 0; chunk < problem.chunks(); ++chunk) {
    Sums<L::M, L::template WARP_CHUNK<T> / 8> sums;
    T* stage = nullptr;
    for (int hidden_block = 0; hidden_block < L::blocks(problem.adapter_width); ++hidden_block) {
      stage = weights.next();
      multiply_by_columns(sums, block.operand + place.first_row * block.pitch + hidden_block * L::COLUMNS, block.pitch,
                          stage + block.warp_column(), PITCH<T>, depth_of<L>(hidden_block, problem.adapter_width),
                          place.lane);
    }
    const T* const norm_weight = stage + L::template WEIGHTS<T> + block.warp_column();
    T* const x_tile = stage + L::template WEIGHTS<T> + L::template NORMS<T>;
    if (block.gradients.norm_sums) sum_norm_gradients(block, tile, chunk, x_tile, x_tile + L::template TILE<T>);
    const T* const x = x_tile + place.first_row * PITCH<T> + block.warp_column();
    T* const grad = x_tile + L::template TILE<T> + place.first_row * PITCH<T> + block.warp_column();
    const auto finish = [&](float dz, float g, const T& x, const T& weight, int slot) {
      if (problem.residual == SkipResidual::NORMED) dz += g;
      if (normed) {
        const float* const sums = block.row_sums + 2 * place.row(slot);
        const RowNorm norm{block.norms[2 * place.row(slot)], block.norms[2 * place.row(slot) + 1]};
        dz = norm.rstd * (dz * to_float(weight) - sums[0] - norm(to_float(x)) * sums[1]);
      }
      return problem.residual == SkipResidual::NONE ? dz : dz + g;
    };
    for_each_pair(sums, place.pair, [&](float& first, float& second, int slot, int column) {
      const int offset = (place.row(slot) - place.first_row) * PITCH<T> + column;
      const auto& g = *reinterpret_cast<const Pair<T>*>(grad + offset);
      first = finish(first, to_float(g.first), x[offset], norm_weight[column], slot);
      second = finish(second, to_float(g.second), x[offset + 1], norm_weight[column + 1], slot);
    });
    if (!block.gradients.x) continue;
    write_sums(sums, place.pair, place.group, grad, PITCH<T>);
    store_warp_tile<L::M * 16, L::template WARP_CHUNK<T>>(
        block.gradients.x, grad, place.lane, tile.first_row + place.first_row, tile.end_row,
        chunk * CHUNK<T> + block.warp_column(), problem.width, problem.aligned);
  }
}

template <class T, class L>
__global__ void __launch_bounds__(L::THREADS, L::BLOCKS)
    backward_kernel(const __grid_constant__ Problem<T> problem, const __grid_constant__ RowGradients<T> gradients) {
  const BackwardBlock<T, L> block(problem, gradients);
  RowTile<T, L> tile(problem);
  if (!tile.exists()) return;
  for (int i = threadIdx.x; i < L::ROWS * block.pitch; i += L::THREADS) block.operand[i] = T(0.0f);  // its padding
  Ring<T, L, BackwardLoader<T, L>> weights({problem, gradients}, block.stages, L::template STAGE<T>(2));
  for (; tile.exists(); tile.advance()) {
    __syncthreads();  // the tile before has no more use for its operand and statistics
    if (problem.normed_before()) measure_rows(block, tile);
    differentiate_hidden(block, weights, tile);
    pass_hidden_on(block, tile);
    if (gradients.needs_grad_of_z()) differentiate_rows(block, weights, tile);
  }
  ptx::copy_wait<0>();
}

}  // namespace
}  // namespace fast_prompt::cuda::skip
