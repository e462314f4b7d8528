"""What `transformers` says of the embedded model: float32 on the CPU, weights dequantised from the same GGUF file.

Loaded once per session. Greedy ids come with the gap between the two best logits of each step: where the gap is
tiny, another order of additions may pick the other id, so a comparison ends there.
"""

from __future__ import annotations

from typing import Any

import torch

SMALL_MARGIN = 1e-2


class Oracle:
    """Greedy continuations and log probabilities of the embedded model."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from outrider.models.gguf import embedded_model_path

        path = embedded_model_path()
        load: dict[str, Any] = {"gguf_file": path.name}
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **load)
        self._model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **load)
        self._model.eval()

    @torch.inference_mode()
    def greedy(self, ids: list[int], max_tokens: int, **options: Any) -> tuple[list[int], list[float]]:
        """``(new ids, margins)``; stops after an end token as `generate` does."""
        prompt = torch.tensor([ids])
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        tops = torch.stack([score[0] for score in out.scores]).topk(2).values
        return out.sequences[0, len(ids) :].tolist(), (tops[:, 0] - tops[:, 1]).tolist()

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Log-softmax ``[T, V]`` of every position, float32."""
        return self._model(torch.tensor([ids])).logits[0].log_softmax(-1)


def comparable(margins: list[float]) -> int:
    """How many leading ids any correct float32 implementation must reproduce."""
    return next((i for i, margin in enumerate(margins) if margin < SMALL_MARGIN), len(margins))
