"""TRL's SFTTrainer on rows that oslo trains too: `trl_peer.py FOLDER`, run with TRITON_INTERPRET=1 on a CPU.

FOLDER holds model/ (and adapter/), tasks.json ({name: {"rows", "adapter", "arguments"}}); the answers go to NAME.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

KEPT = ("loss", "learning_rate", "grad_norm")


def train(folder: Path, name: str, task: dict[str, Any]) -> dict[str, Any]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if task["adapter"]:
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / f"{name}-out"),
            bf16=False,  # on by default
            gradient_checkpointing=False,  # on by default
            max_length=None,  # 1024 by default
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **task["arguments"],
        ),
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    logs = [{key: entry[key] for key in KEPT} for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {"logs": logs, "weights": weights}


def main() -> None:
    folder = Path(sys.argv[1])
    for name, task in json.loads((folder / "tasks.json").read_text()).items():
        torch.save(train(folder, name, task), folder / f"{name}.pt")


if __name__ == "__main__":
    main()
