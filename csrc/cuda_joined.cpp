// See cuda_joined.h.
#include "cuda_joined.h"

#include <ATen/ATen.h>

#include "layer.h"

namespace fastspec::on_cuda {
namespace {

using at::Tensor;

constexpr int64_t kColumns = 8;  // of 16 bits: 16 bytes, which cuBLAS's fast kernels want rows to begin on

int64_t padded(int64_t k) { return (k + kColumns - 1) / kColumns * kColumns; }

bool two_bytes(const Tensor& t) { return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf; }

// Whether the matrix `part` begins `offset` elements behind `weight`, in its storage, dtype and steps.
bool lies(const Tensor& part, const Tensor& weight, int64_t offset) {
  return part.is_alias_of(weight) && part.scalar_type() == weight.scalar_type() &&
         part.storage_offset() == weight.storage_offset() + offset && part.stride(0) == weight.stride(0) &&
         part.stride(1) == 1;
}

// Whether the storage has `count` elements from the first of `weight` on.
bool holds(const Tensor& weight, int64_t count) {
  return static_cast<uint64_t>(weight.storage_offset() + count) * weight.itemsize() <= weight.storage().nbytes();
}

// The matrix [.., columns] of rows such as those of `like` [..., last].
Tensor shaped(const Tensor& matrix, const Tensor& like) {
  return like.dim() == 2 ? matrix : matrix.view(with_last(like, matrix.size(1)));
}

}  // namespace

Products joined_forward(const Tensor& x, const Tensor& x2, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& vh) {
  const int64_t out = weight.size(0), in = weight.size(1), k = vh.size(0), row = weight.stride(0);
  const int64_t rows = out + padded(k), behind = rows * row;
  // a wider result would cost those who read it more than the product saves
  const bool worth = out <= in && two_bytes(weight) && x2.scalar_type() == weight.scalar_type();
  if (!worth || weight.stride(1) != 1 || !lies(vh, weight, out * row)) return std::nullopt;
  if (!holds(weight, bias ? behind + rows : behind)) return std::nullopt;
  const bool bias_lies =
      !bias || (bias->is_alias_of(weight) && bias->scalar_type() == weight.scalar_type() &&
                bias->storage_offset() == weight.storage_offset() + behind && bias->stride(0) == 1);
  if (!bias_lies) return std::nullopt;
  const Tensor both = weight.as_strided({rows, in}, {row, 1}).t();
  if (!bias) {
    const Tensor yp = at::mm(x2, both);
    return std::tuple(shaped(yp.narrow(1, 0, out), x), yp.narrow(1, out, k).clone(at::MemoryFormat::Contiguous));
  }
  const Tensor more = bias->as_strided({rows}, {1});
  const Tensor yp = at::addmm(more, x2, both);
  // a copy of p, so that y's memory is y's; zeros are taken off, or whatever else had been added
  return std::tuple(shaped(yp.narrow(1, 0, out), x), at::sub(yp.narrow(1, out, k), more.narrow(0, out, k)));
}

Products joined_backward(const Tensor& g, const Tensor& g2, const Tensor& weight, const Tensor& u) {
  const int64_t out = weight.size(0), in = weight.size(1), k = u.size(1), row = weight.stride(0);
  const int64_t columns = in + padded(k);
  const bool worth = in <= out && two_bytes(weight) && g2.scalar_type() == weight.scalar_type();
  if (!worth || weight.stride(1) != 1 || row < columns || !lies(u, weight, in)) return std::nullopt;
  if (!holds(weight, (out - 1) * row + columns)) return std::nullopt;
  const Tensor both = at::mm(g2, weight.as_strided({out, columns}, {row, 1}));
  return std::tuple(shaped(both.narrow(1, 0, in), g), both.narrow(1, in, k));
}

}  // namespace fastspec::on_cuda
