"""``generate()`` of a small causal LM that is trained quantized; the file then says the same tokens.

python examples/generate.py [fxquant_eager]
"""

from __future__ import annotations

import sys
import tempfile

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
TOKENS = (torch.arange(17) * 3 % 29 + torch.arange(32)[:, None]) % 29


class Logits(nn.Module):
    """What a file computes: tokens to the logits of the next one, without a cache."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    net = Logits(LlamaForCausalLM(config))
    fxquant.prepare(net, (TOKENS[:2, :-1],))
    step = torch.compile(net, backend=BACKEND, dynamic=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(step(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.4f}")
    net.eval()
    said = net.model.generate(TOKENS[:4, :6], max_new_tokens=10, do_sample=False)  # float: it is not compiled
    with tempfile.TemporaryDirectory() as folder:
        fxquant.export_onnx(net, (TOKENS[:, :-1],), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(net, (TOKENS[:, :-1],), f"{folder}/model.onnx"))
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
        window = TOKENS[:4, :16].clone()
        for end in range(6, 16):  # causal: what stands after a place does not move its logits
            (logits,) = session.run(None, {session.get_inputs()[0].name: window.numpy()})
            window[:, end] = torch.from_numpy(logits[:, end - 1].argmax(-1))
        print("the file says the same tokens:", torch.equal(window, said))


if __name__ == "__main__":
    main()
