"""The file that `oslo init` writes."""

from typing import Final

STARTER: Final = """\
# A fine-tuning run. `oslo validate` says what it will do, `oslo submit --local` does it here.
# Only model_name and path must be there; what is commented out shows the default.

# name: sft                        # the run's name; default: this file's name
# training_type: sft

opensloth:
  fast_model_args:
    model_name: unsloth/Qwen2.5-0.5B-Instruct   # a Hugging Face name or a local folder
    # max_seq_length: 4096         # tokens; longer documents are dropped and counted
    # load_in_4bit: true           # QLoRA; needs CUDA and gives way without it
    # full_finetuning: false       # true: every weight instead of an adapter
  # lora_args:
  #   r: 8                         # rank
  #   lora_alpha: 16
  #   lora_dropout: 0.0
  # devices: [0]                   # one process for each
  # sequence_packing: true         # fill rows with whole documents that cannot see each other

dataset:
  path: train.jsonl                # relative to this file, or a hub name such as OWNER/NAME
  # format: auto                   # messages, sharegpt, alpaca, prompt_completion, input_output, text, tokenized
  # columns: {prompt: question, completion: answer}   # if yours have other names
  # train_on: assistant            # or last, or all
  # eval_fraction: 0.0             # this share is evaluated instead of trained

# training:                        # transformers' names
#   learning_rate: 2e-4
#   num_train_epochs: 3
#   per_device_train_batch_size: 2
#   gradient_accumulation_steps: 4
#   warmup_steps: 10
#   optim: adamw_8bit              # needs CUDA and gives way without it

# job:                             # for `oslo submit` on a cluster; `oslo render` prints the PyTorchJob
#   image: registry.example/opensloth:1.0
#   volume: training               # the claim that every pod mounts at /shared
#   nodes: 1
#   gpus_per_node: 1
#   secrets: {HF_TOKEN: hf-token/token}   # name in the pod: secret/key
"""
