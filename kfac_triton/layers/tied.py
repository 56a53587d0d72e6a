"""An nn.Embedding and an nn.Linear that share one weight (tokens, dimensions), as language models tie them."""

from __future__ import annotations

from torch import nn

from .base import Layer
from .embedding import EmbeddingLayer
from .linear import LinearLayer


class TiedLayer(LinearLayer):
    """One Kronecker block for both uses: G (rows, tokens) is diagonal, A (columns, dimensions) a matrix.

    As a Linear, the decoder, the weight has the Fisher matrix R_d (x) C_d with R_d the diagonal of E[g g^T] and C_d = E[h h^T];
    as an embedding R_e (x) C_e with R_e = diag(frequencies) and C_e = E[g_e g_e^T]. The sum of the two is not a Kronecker
    product, but for every u > 0

        (R_d + R_e / u) (x) (C_d + u C_e) = R_d (x) C_d + R_e (x) C_e + u R_d (x) C_e + R_e (x) C_d / u

    bounds it from above in the positive semidefinite order. The trace of the difference is smallest at

        u = sqrt(tr R_e tr C_d / (tr R_d tr C_e)),

    which is how Martens and Grosse (2015, section 6.3) choose pi. Curvature between the two uses is ignored, as between any
    two layers. The uses are summed separately, and joined at the step (see `kfac_triton.capture.tied`).

    The bias is the decoder's, if it has one and is the only one.
    """

    diagonal_gradients = True
    samples_tokens = False
    embedding_batch_dim: int = 0  # `batch_dim` is the decoder's

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[Layer] | None:
        """This adapter, if there are modules of both types and no others, and every embedding could be covered on its own."""
        embeddings = [module for module in modules if type(module) is nn.Embedding]
        decoders = [module for module in modules if type(module) is nn.Linear]
        if not embeddings or not decoders or len(embeddings) + len(decoders) < len(modules):
            return None
        return cls if all(EmbeddingLayer.why_not(module) is None for module in embeddings) else None

    def share(self, modules: list[nn.Module]) -> None:
        """Takes weight and bias from the decoder, which may come before or after the embedding in the model."""
        decoders: list[nn.Module] = [module for module in modules if isinstance(module, nn.Linear)]
        self.module = decoders[0]
        bias = self.module._parameters.get("bias")
        self.has_bias = bias is not None and bias.requires_grad
        super().share(decoders)
        self.modules = modules

    def second(self) -> EmbeddingLayer:
        """A layer for the embedding alone, whose statistics are summed separately."""
        embedding = next(module for module in self.modules if isinstance(module, nn.Embedding))
        sharing, terms = "reduce" if self.reduce else "expand", "tokens" if self.tokens else "examples"
        layer = EmbeddingLayer(self.name, embedding, sharing, terms)
        layer.batch_dim = self.embedding_batch_dim
        return layer

    def uses_weight_transposed(self, use: int) -> bool:
        """Whether that module is an embedding."""
        return isinstance(self.modules[use], nn.Embedding)
