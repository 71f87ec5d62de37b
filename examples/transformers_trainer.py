"""A transformers Trainer that trains quantized: bfloat16, gradient checkpointing, resumed, the best one kept.

pip install "fxquant[onnx,examples]" && python examples/transformers_trainer.py
"""

from __future__ import annotations

import sys
import tempfile

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"


class Parity(Dataset):
    """Is the first token's number odd?"""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.randint(3, 60, (rows, 16), generator=torch.Generator().manual_seed(rows))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, 0] % 2}


def prepared() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(config)
    fxquant.prepare(model, (Parity(2).tokens,))
    model.compile(backend=BACKEND)  # TrainingArguments(torch_compile_backend=…) takes only names that accelerate lists
    return model


def trainer(folder: str) -> Trainer:
    arguments = TrainingArguments(
        folder, max_steps=20, learning_rate=5e-3, per_device_train_batch_size=32, bf16=True, use_cpu=True,
        activation_checkpointing=True, eval_strategy="steps", eval_steps=10, save_steps=10, load_best_model_at_end=True,
        full_determinism=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    return Trainer(prepared(), arguments, train_dataset=Parity(640), eval_dataset=Parity(64))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(folder)
        whole.train()
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-10")
        states = (each.model.state_dict() for each in (whole, resumed))
        same = all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
        print("resumed run is bit-identical:", same)
        whole.save_model(f"{folder}/best")
        model = prepared()
        model.load_state_dict(load_file(f"{folder}/best/model.safetensors"))
        path = f"{folder}/model.onnx"
        fxquant.export_onnx(model.eval(), (Parity(8).tokens,), path)
        print(fxquant.verify_onnx(model, (Parity(8).tokens,), path))


if __name__ == "__main__":
    main()
