"""--quantize: the linear layers of a frozen network's blocks, stored in int8 or nf4 and made dense where they
are used. LoRAs on them, guidance and sampling stay as they are.

    int8  one scale per output of a layer: 1 byte a weight
    nf4   16 values, quantiles of a Gaussian, and a scale per 64 weights (QLoRA, arXiv 2305.14314), by
          bitsandbytes: 0.56 bytes a weight

Why int8 is no library's: torchao's layers keep the dense weight in the graph for the backward, so nothing is
saved in training, and sum before they scale, which overflows in float16."""

import math

import torch
import torch.nn.functional as F


def quantize(layer, how):
    """Make a linear layer a Quantized one. nf4 leaves it dense if its blocks of 64 weights are not full:
    bitsandbytes has been wrong there on some CPUs."""
    weight = layer.weight
    if how == "int8":
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        packed = (weight / scale).round().to(torch.int8)
    elif weight.numel() % 64 == 0:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.reshape(1, -1), blocksize=64, quant_type="nf4")
        scale = state.absmax
    else:
        return
    layer.__class__ = Quantized
    layer.packed = torch.nn.Parameter(packed, requires_grad=False)
    layer.scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)  # T5 looks at its data type


class Quantized(torch.nn.Linear):
    """A frozen linear layer with a quantized weight: `packed`, and `scale` in float32."""

    def forward(self, x):
        return Product.apply(x, self.packed, self.scale, self.bias, self.out_features)


class Product(torch.autograd.Function):
    """x W^T + bias. The backward makes W again, so no graph keeps it dense."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias, outputs):
        ctx.save_for_backward(packed, scale)
        ctx.size = outputs, x.shape[-1]
        return torch.ops.flow_opd.product(x, packed, scale, bias, ctx.size, False)

    @staticmethod
    def backward(ctx, grad):
        grad_x = torch.ops.flow_opd.product(grad, *ctx.saved_tensors, None, ctx.size, True)
        return grad_x, None, None, None, None


# An operator of its own: torch.compile does not look into it, or it would keep W for the backward.
SIGNATURE = "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int[] size, bool transposed) -> Tensor"
torch.library.define("flow_opd::product", SIGNATURE)


@torch.library.impl("flow_opd::product", "default")
def product(x, packed, scale, bias, size, transposed):
    """x W^T + bias, or x W."""
    W = dense(packed, scale, size, x.dtype)
    return F.linear(x, W.T if transposed else W, bias)


@torch.library.register_fake("flow_opd::product")
def product_shape(x, packed, scale, bias, size, transposed):
    return x.new_empty(*x.shape[:-1], size[transposed])


def dense(packed, scale, size, dtype):
    """The weight, of size (out, in)."""
    if packed.dtype == torch.int8:
        return packed.float().mul_(scale).to(dtype)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(absmax=scale, shape=(1, math.prod(size)), dtype=dtype, blocksize=64, quant_type="nf4")
    return dequantize_4bit(packed, state).view(size)


def try_nf4(device):
    """Raises if bitsandbytes cannot do it on this device."""
    layer = torch.nn.Linear(64, 64, device=device)
    quantize(layer, "nf4")
    layer(torch.ones(1, 64, device=device))
