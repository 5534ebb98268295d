"""Config files, good and bad, with what oslo says to them: the table of the tests and of docs/config-errors.md."""

from __future__ import annotations

from dataclasses import dataclass, field

MODEL = "opensloth: {fast_model_args: {model_name: a/b}}\n"
DATA = "dataset: {path: train.jsonl}\n"
GOOD = MODEL + DATA


@dataclass(frozen=True)
class Case:
    """text: of sft.yaml, beside which lies train.jsonl; sets: arguments of --set; defaults: text of defaults.yaml.

    says: the lines of the message; empty for a file without problems.
    """

    title: str
    text: str
    says: list[str] = field(default_factory=list)
    sets: tuple[str, ...] = ()
    defaults: str | None = None
    cluster: bool = False

    @property
    def is_good(self) -> bool:
        return not self.says


GOOD_CASES = [
    Case("The smallest file", GOOD),
    Case("Numbers as YAML 1.2 has them", GOOD + "training: {learning_rate: 2e-4, warmup_steps: .1}\n"),
    Case("Words that YAML 1.1 would turn into booleans", GOOD + "training: {eval_strategy: no, save_strategy: no}\n"),
    Case(
        "Two datasets with weights",
        MODEL + "dataset:\n  - {path: train.jsonl, weight: 2}\n  - {path: OWNER/NAME, split: train}\n",
    ),
    Case("A key of transformers with the one value that oslo uses anyway", GOOD + "training: {fp16: false}\n"),
    Case("A value from the command line", GOOD, sets=("training.max_steps=20", "dataset.train_on=last")),
    Case("A prepared dataset", "opensloth: {data_cache_path: prepared, fast_model_args: {model_name: a/b}}\n"),
    Case(
        "A job section over a defaults file",
        GOOD + "job: {nodes: 2, env: {NCCL_DEBUG: WARN}}\n",
        defaults="job: {image: registry.example/opensloth:1.0, volume: training, env: {TZ: UTC}}\n",
        cluster=True,
    ),
    Case(
        "A model and a checkpoint on the cluster's volume",
        "opensloth: {fast_model_args: {model_name: 'pvc:models/a'}}\n"
        + DATA
        + "training: {resume_from_checkpoint: /shared/runs/a-12345678/checkpoints/step-00000020}\n"
        + "job: {image: registry.example/opensloth:1.0, volume: training}\n",
        cluster=True,
    ),
    Case("Anchors", MODEL + "dataset:\n  - &one {path: train.jsonl}\n  - *one\n"),
]

BAD_CASES = [
    Case(
        "Misspelt keys",
        "opensloth: {fast_model_args: {model_nam: a/b}}\n" + DATA + "training:\n  lerning_rate: 2e-4\n",
        [
            "3 problems in sft.yaml:",
            "sft.yaml:1: opensloth.fast_model_args.model_nam: unknown key (did you mean model_name?)",
            "sft.yaml:1: opensloth.fast_model_args.model_name: missing: this key must be given",
            "sft.yaml:4: training.lerning_rate: unknown key (did you mean learning_rate?)",
        ],
    ),
    Case(
        "A section that does not exist",
        GOOD + "trainings: {seed: 1}\n",
        ["1 problem in sft.yaml:", "sft.yaml:3: trainings: unknown key (did you mean training?)"],
    ),
    Case(
        "Wrong types and values out of range",
        GOOD
        + "training:\n  num_train_epochs: three\n  per_device_train_batch_size: 0\n  seed: 1.5\n  report_to: foo\n",
        [
            "4 problems in sft.yaml:",
            'sft.yaml:4: training.num_train_epochs: expected a number, got "three"',
            "sft.yaml:5: training.per_device_train_batch_size: expected 1 or above, got 0",
            "sft.yaml:6: training.seed: expected a whole number, got 1.5",
            "sft.yaml:7: training.report_to: expected 'tensorboard', 'wandb', 'mlflow' or 'none' or a list, "
            'got "foo"',
        ],
    ),
    Case(
        "A number in quotes is text",
        GOOD + 'training: {learning_rate: "2e-4"}\n',
        ["1 problem in sft.yaml:", 'sft.yaml:3: training.learning_rate: expected a number, got "2e-4"'],
    ),
    Case(
        "A key given twice",
        GOOD + "training:\n  seed: 1\n  seed: 2\n",
        ["1 problem in sft.yaml:", "sft.yaml:5: training.seed: given twice, first on line 4 (keep one of the two)"],
    ),
    Case(
        "A tab",
        MODEL + "dataset:\n\tpath: train.jsonl\n",
        [
            "1 problem in sft.yaml:",
            "sft.yaml:3: not valid YAML: a tab or one of @ ` % starts a value: indent by spaces, quote the value",
        ],
    ),
    Case(
        "A bracket that is not closed",
        GOOD + "training: {seed: 1\n",
        [
            "1 problem in sft.yaml:",
            "sft.yaml:4: not valid YAML: a `{` or `[` that is not closed, or a missing comma",
        ],
    ),
    Case(
        "Several documents",
        GOOD + "---\n" + GOOD,
        [
            "1 problem in sft.yaml:",
            "sft.yaml:3: several documents in one file: keep one (what stands after `---`, on its own)",
        ],
    ),
    Case(
        "An empty file",
        "# nothing yet\n",
        [
            "1 problem in sft.yaml:",
            "sft.yaml: the file is empty (the smallest file: opensloth: {fast_model_args: {model_name: ...}} "
            "and dataset: {path: train.jsonl})",
        ],
    ),
    Case(
        "No mapping",
        "- a\n- b\n",
        [
            "1 problem in sft.yaml:",
            'sft.yaml:1: expected a mapping of sections, got ["a", "b"] (the smallest file: '
            "opensloth: {fast_model_args: {model_name: ...}} and dataset: {path: train.jsonl})",
        ],
    ),
    Case(
        "A data file that is not there",
        MODEL + "dataset: {path: trian.jsonl}\n",
        [
            "1 problem in sft.yaml:",
            "sft.yaml:2: dataset.path: no such file or folder: trian.jsonl (did you mean train.jsonl?)",
        ],
    ),
    Case(
        "An adapter and a checkpoint that are not there",
        "opensloth: {fast_model_args: {model_name: a/b}, pretrained_lora: out/adapter}\n"
        + DATA
        + "training: {resume_from_checkpoint: step-00000020}\n",
        [
            "2 problems in sft.yaml:",
            "sft.yaml:1: opensloth.pretrained_lora: no such folder: out/adapter (there is no folder out)",
            "sft.yaml:3: training.resume_from_checkpoint: no such folder: step-00000020",
        ],
    ),
    Case(
        "Folders that pods are to get from this machine, and that are not there",
        "opensloth: {fast_model_args: {model_name: ./model}, pretrained_lora: out/adapter}\n"
        + DATA
        + "training: {resume_from_checkpoint: step-00000020}\n"
        + "job: {image: registry.example/opensloth:1.0, volume: training}\n",
        [
            "3 problems in sft.yaml:",
            "sft.yaml:1: opensloth.fast_model_args.model_name: no such folder: model",
            "sft.yaml:1: opensloth.pretrained_lora: no such folder: out/adapter (there is no folder out)",
            "sft.yaml:3: training.resume_from_checkpoint: no such folder: step-00000020",
        ],
        cluster=True,
    ),
    Case(
        "No data at all",
        MODEL,
        [
            "1 problem in sft.yaml:",
            "sft.yaml: dataset: missing: there is nothing to train on (add dataset: {path: train.jsonl}, "
            "or name a prepared dataset in opensloth.data_cache_path)",
        ],
    ),
    Case(
        "A training type that is not there yet",
        "training_type: dpo\n" + GOOD,
        [
            "1 problem in sft.yaml:",
            "sft.yaml:1: training_type: 'dpo' is not there yet; this version trains 'sft' only",
        ],
    ),
    Case(
        "Keys of transformers that cannot be honoured",
        GOOD + "training:\n  fp16: true\n  deepspeed: ds.json\n  warmup_ratio: 0.1\n",
        [
            "3 problems in sft.yaml:",
            "sft.yaml:4: training.fp16: only false is possible: float16 needs loss scaling; use bf16, "
            "or float32 where there is no bf16",
            "sft.yaml:5: training.deepspeed: not supported: sharding is not there yet; "
            "use LoRA, 4-bit or a smaller model",
            "sft.yaml:6: training.warmup_ratio: not supported: use warmup_steps with a number below 1",
        ],
    ),
    Case(
        "Contradictions",
        "opensloth:\n  fast_model_args: {model_name: a/b, load_in_4bit: true, full_finetuning: true}\n"
        "dataset: {path: train.jsonl, eval_path: train.jsonl, eval_fraction: 0.1}\n",
        [
            "2 problems in sft.yaml:",
            "sft.yaml:2: opensloth.fast_model_args: full_finetuning trains every weight, which load_in_4bit makes "
            "impossible: drop one of the two",
            "sft.yaml:3: dataset: eval_path and eval_fraction exclude each other: keep one",
        ],
    ),
    Case(
        "A step whose rows cannot be spread",
        GOOD + "training: {global_batch_size: 7}\n",
        [
            "1 problem in sft.yaml:",
            "sft.yaml:3: training.global_batch_size: 7 rows cannot be spread over 1 process x 2 rows "
            "(per_device_train_batch_size) (nearest sizes that can: 6, 8)",
        ],
    ),
    Case(
        "A name that Kubernetes would refuse",
        "name: Support_Bot\n" + GOOD,
        [
            "1 problem in sft.yaml:",
            "sft.yaml:1: name: expected lower-case letters, digits and '-', first a letter, at most 40 characters, "
            'got "Support_Bot"',
        ],
    ),
    Case(
        "--set that does not fit",
        GOOD,
        [
            "4 problems in sft.yaml:",
            "--set seed: expected KEY=VALUE, as in training.learning_rate=1e-4 or dataset[1].path=x",
            "--set dataset[1].path=b.jsonl: dataset[1].path: dataset is not a list: leave out [1]",
            "--set training.sede=1: training.sede: unknown key (did you mean seed?)",
            '--set training.seed=x: training.seed: expected a whole number, got "x"',
        ],
        sets=("seed", "dataset[1].path=b.jsonl", "training.seed=x", "training.sede=1"),
    ),
    Case(
        "Secrets in the file",
        GOOD + "job:\n  env: {HF_TOKEN: abc}\n  secrets: {WANDB_API_KEY: 0123}\n",
        [
            "2 problems in sft.yaml:",
            "sft.yaml:4: job.env.HF_TOKEN: looks like a secret, and values of a file end up in objects and logs "
            "(put it in a Secret and write job: {secrets: {HF_TOKEN: SECRET/KEY}})",
            "sft.yaml:5: job.secrets.WANDB_API_KEY: expected SECRET/KEY: the name of a Secret and a key in it "
            "(as in HF_TOKEN: hf-token/token)",
        ],
    ),
    Case(
        "A job that cannot be",
        GOOD + "job:\n  nodes: 0\n  memory: 64GB\n  deadline: 12\n  labels: {opensloth/run: x}\n"
        "  volumes:\n    - {hostPath: /data}\n    - {mount_path: /data}\n  env: {RANK: '0'}\n",
        [
            "7 problems in sft.yaml:",
            "sft.yaml:4: job.nodes: expected 1 or above, got 0",
            "sft.yaml:5: job.memory: expected a quantity such as 4, 500m, 64Gi or 200G, got '64GB'",
            "sft.yaml:6: job.deadline: expected text, got 12",
            "sft.yaml:7: job.labels.opensloth/run: this prefix belongs to oslo or to the training operator "
            "(leave it out)",
            "sft.yaml:9: job.volumes[0].hostPath: not supported: a path of the node opens the node to the pod, "
            "and Pod Security forbids it (use a claim)",
            "sft.yaml:10: job.volumes[1]: expected one of claim, config_map, secret; got none",
            "sft.yaml:11: job.env.RANK: is set by the training operator or by oslo (leave it out)",
        ],
    ),
    Case(
        "Labels that are oslo's own or would harm",
        GOOD + "job:\n  labels:\n    app.kubernetes.io/name: mine\n    kueue.x-k8s.io/queue-name: batch\n"
        "    sidecar.istio.io/inject: 'true'\n",
        [
            "3 problems in sft.yaml:",
            "sft.yaml:5: job.labels.app.kubernetes.io/name: is set by oslo (leave it out)",
            "sft.yaml:6: job.labels.kueue.x-k8s.io/queue-name: is job.queue: on the pods it would queue each by itself "
            "(leave it out)",
            "sft.yaml:7: job.labels.sidecar.istio.io/inject: is always false: a sidecar would outlive the training "
            "(leave it out)",
        ],
    ),
    Case(
        "A cluster without an image",
        GOOD + "job: {nodes: 2}\n",
        [
            "2 problems in sft.yaml:",
            "sft.yaml:3: job.image: missing (a cluster needs the training image, as in "
            "job: {image: registry.example/opensloth:1.0})",
            "sft.yaml:3: job.volume: missing (a cluster needs the claim that pods mount at /shared, as in "
            "job: {volume: training})",
        ],
        cluster=True,
    ),
    Case(
        "A defaults file with a mistake",
        GOOD,
        [
            "2 problems in sft.yaml:",
            "defaults.yaml:1: training: a defaults file fills `job` only (leave it out)",
            "defaults.yaml:3: job.imge: unknown key (did you mean image?)",
        ],
        defaults="training: {seed: 1}\njob:\n  imge: registry.example/opensloth:1.0\n",
    ),
    Case(
        "A volume's path in a local run",
        "opensloth: {fast_model_args: {model_name: 'pvc:models/a'}}\ndataset: {path: 'pvc:data/train.jsonl'}\n",
        [
            "2 problems in sft.yaml:",
            "sft.yaml:1: opensloth.fast_model_args.model_name: pvc:models/a is on a cluster's volume, which a local "
            "run cannot read (give a folder of this machine)",
            "sft.yaml:2: dataset.path: pvc:data/train.jsonl is on a cluster's volume, which a local run cannot read "
            "(give a file of this machine)",
        ],
    ),
]
