"""Generation of 8192 tokens with a cache: a small Llama, whose positions are a bias, decodes them one by one.

The weights are random (the speed and the equality do not depend on them); every layer has a TISA in place of RoPE. At
each step attention is that of one query with all keys of the cache, O(N) for N tokens. Afterwards one forward pass of
the whole text, without a cache, must give the logits that generation had at every step, up to rounding, and the same
tokens.

    python examples/generate_8192.py              a minute
    python examples/generate_8192.py --quick      seconds

It printed, with one thread of a busy CPU:

      2032 tokens generated, the last 2032 at 204 a second
      4064 tokens generated, the last 2032 at 168 a second
      6096 tokens generated, the last 2032 at 140 a second
      8128 tokens generated, the last 2032 at 127 a second
    8128 tokens in 52.6 s: 155 a second
    the whole text of 8192 at once: 1.2 s
    largest difference of logits, of all steps: 1.1e-03, the largest logit 6.5
    tokens that the whole text gives as well: 100.00 %
"""

from __future__ import annotations

import time
from typing import Any

import torch
from text import VOCABULARY, options_of, read_text
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from posattn import TISA
from posattn.integrations.transformers import attach


class Clock(BaseStreamer):
    """Prints how fast tokens come, a few times on the way."""

    def __init__(self, total: int) -> None:
        self.every, self.count, self.start = (
            max(1, total // 4),
            -1,
            time.perf_counter(),
        )  # the prompt comes first

    def put(self, value: Any) -> None:
        self.count += 1
        if self.count and self.count % self.every == 0:
            speed = self.every / (time.perf_counter() - self.start)
            print(
                f"{self.count:6} tokens generated, the last {self.every} at {speed:.0f} a second", flush=True
            )
            self.start = time.perf_counter()

    def end(self) -> None:
        pass


def main() -> None:
    options = options_of(__doc__, tokens=(8192, "length of the text at the end"), prompt=(64, "bytes given"))
    tokens, prompt = (192, 16) if options.quick else (options.tokens, options.prompt)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,  # so that random weights say something definite
    )
    model = LlamaForCausalLM(config).to(options.device).eval()
    attach(model, lambda layer, heads: TISA(heads), positions="drop")
    given = read_text(options.text)[1][None, :prompt].long().to(options.device)

    start = time.perf_counter()
    generated = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens - prompt,
        do_sample=False,
        streamer=Clock(tokens - prompt),
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    text = generated.sequences
    print(
        f"{text.shape[1] - prompt} tokens in {seconds:.1f} s: {(text.shape[1] - prompt) / seconds:.0f} a second"
    )

    start = time.perf_counter()
    with torch.no_grad():
        whole = model(text, use_cache=False).logits[0, prompt - 1 : -1]
    print(f"the whole text of {text.shape[1]} at once: {time.perf_counter() - start:.1f} s")
    steps = torch.cat(generated.logits)
    same = (whole.argmax(-1) == text[0, prompt:]).float().mean().item()
    difference = (steps - whole).abs().max()
    print(
        f"largest difference of logits, of all steps: {difference:.1e}, the largest logit {whole.abs().max():.1f}"
    )
    print(f"tokens that the whole text gives as well: {100 * same:.2f} %")


if __name__ == "__main__":
    main()
