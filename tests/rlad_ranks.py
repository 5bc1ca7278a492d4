"""One process of two that train RLAD on the CPU: in the first step rank 1 has no kept token, in the second it has fewer.

``python -m tests.rlad_ranks RANK PORT DIRECTORY`` prints the metrics of each step before they are gathered, and the logs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from tests import tiny
from tests.trl_runs import COMMON, config_and_trainer, dataset, reward


def main(rank: int, port: str, directory: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    options = {"max_completion_length": 6, "num_generations": 4, "beta": 0.0, "alpha": 0.3, "topk": 4, "max_steps": 2}
    config, trainer_type = config_and_trainer("RLAD")
    args = config(output_dir=directory, mask_truncated_completions=True, ddp_timeout=60, **{**COMMON, **options})
    trainer = trainer_type(
        model=tiny.model(), teacher=tiny.model(seed=1, hidden_size=48), args=args, train_dataset=dataset("RLAD"),
        processing_class=tiny.tokenizer(), reward_funcs=reward,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    steps = iter([(4, 0), (4, 1)])  # answers that come to an end, of four, on each rank; the others are masked

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        new = torch.randint(0, 255, (len(input_ids), 6), generator=torch.Generator().manual_seed(rank))
        new[: next(steps)[rank], 4] = tiny.EOS
        return torch.cat([input_ids, new], 1)

    trainer.model.generate = generate
    found: list[Any] = []
    record = trainer._record

    def see(mode: str, metrics: dict[str, torch.Tensor], kept: torch.Tensor, aux_loss: Any) -> None:
        found.append({"kept": int(kept), **{k: float(x) for k, x in metrics.items()}})
        record(mode, metrics, kept, aux_loss)

    trainer._record = see
    trainer.train()
    print("FOUND " + json.dumps({"steps": found, "logs": trainer.state.log_history}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
