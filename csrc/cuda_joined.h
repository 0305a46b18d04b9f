// A kept copy of W_eff that lies with its factors in one storage, so that cuBLAS makes a layer's product and its
// projection at once. fastspec/nn/joined.py lays it out, for k rounded up to k':
//
//     [[W_eff, U ],     [out + k', in + k'], row-major
//      [Vh,    0 ]]
//     [bias, 0]         [out + k']
//
// y and dx then are columns of a wider matrix, so their rows lie apart. The two directions are known by where their
// operands lie; any other operands are none.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastspec::on_cuda {

using Products = std::optional<std::tuple<at::Tensor, at::Tensor>>;

// y [..., out] and a compact p [N, k] of x2 [N, in], the rows of x; y has the other sizes of x.
Products joined_forward(const at::Tensor& x, const at::Tensor& x2, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& vh);

// dx [..., in] and q = g U [N, k], of g2 [N, out], the rows of g; dx has the other sizes of g.
Products joined_backward(const at::Tensor& g, const at::Tensor& g2, const at::Tensor& weight, const at::Tensor& u);

}  // namespace fastspec::on_cuda
