"""One rank of a small training, started by test_ranks.py: `train_rank.py OUT STEPS [CHECKPOINT]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny
from safetensors.torch import save_file

from opensloth.dist import leave_world
from opensloth.opensloth_config import FastModelArgs, OpenSlothConfig, TrainingArguments
from opensloth.trainer_factory import create_sft_trainer

out, steps = Path(sys.argv[1]), int(sys.argv[2])
world = int(os.environ["WORLD_SIZE"])
trainer = create_sft_trainer(
    tiny.make_model(),
    tiny.make_tokenizer(),
    tiny.random_rows(61, longest=30),  # targets are spread unevenly, and the last step of an epoch is short
    OpenSlothConfig(data_cache_path="-", fast_model_args=FastModelArgs(model_name="tiny", max_seq_length=64)),
    TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        global_batch_size=8,
        per_device_train_batch_size=2,
        optim="adamw_torch",
        learning_rate=1e-2,
        warmup_steps=2,
        report_to="none",
        save_steps=3,
        use_cpu=True,
    ),
    eval_dataset=tiny.random_rows(9, seed=5),
)
trainer.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
rank = os.environ["RANK"]
tensors = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
save_file(tensors, str(out / f"weights-{rank}.safetensors"))
leave_world()
