"""Llama gets DAPE in place of RoPE, trains a little, and reads longer texts than it was trained on.

A small Llama with grouped keys is trained on bytes for a short while, as it is, with RoPE. Then one line gives each
layer a DAPE over KERPLE (Zheng et al., NeurIPS 2024), a small network that mixes the scores of all heads and a bias,
and drops RoPE; the model trains on. Its twin trains as long with RoPE. The loss, in nats a byte, is that of held-out
text read in pieces of the length trained at, and of up to eight times that.

    python examples/llama_dape.py              a minute
    python examples/llama_dape.py --quick      seconds

It printed, with one thread of a busy CPU:

    loss at length                            64       128       256       512
    Llama, RoPE                            2.251     2.260     2.333     2.364
    DAPE attached, before fine-tuning      2.327     2.332     2.330     2.332
    DAPE-KERPLE, fine-tuned                1.940     1.931     1.928     1.926
    RoPE, trained as long                  1.915     1.937     2.182     2.338
    a step took 75 ms with DAPE, 21 ms with RoPE, of processor time
"""

from __future__ import annotations

import copy

import torch
from text import VOCABULARY, loss_at, options_of, read_text, train
from transformers import LlamaConfig, LlamaForCausalLM

from posattn import DAPE, KERPLE
from posattn.integrations.transformers import attach


def main() -> None:
    options = options_of(__doc__, steps=(200, "of each of the trainings"), length=(64, "trained at"))
    steps, length = (15, 32) if options.quick else (options.steps, options.length)
    training, held_out = read_text(options.text)
    lengths = [length * n for n in ((1, 4) if options.quick else (1, 2, 4, 8))]
    read = 8 * length if options.quick else 64 * length

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2 if options.quick else 3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=lengths[-1],
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).to(options.device)

    def report(name: str, model: torch.nn.Module) -> None:
        losses = [loss_at(model, held_out, n, read) for n in lengths]
        print(f"{name:34}" + "".join(f"{loss:10.3f}" for loss in losses), flush=True)

    print(f"{'loss at length':34}" + "".join(f"{n:10}" for n in lengths), flush=True)
    train(model, training, length, steps)
    report("Llama, RoPE", model)
    twin = copy.deepcopy(model)

    attach(model, lambda layer, heads: DAPE(heads, base=KERPLE(heads)), positions="drop")
    report("DAPE attached, before fine-tuning", model)
    second = train(model, training, length, steps)
    report("DAPE-KERPLE, fine-tuned", model)
    twin_second = train(twin, training, length, steps)
    report("RoPE, trained as long", twin)
    if options.device == "cpu":
        milliseconds = f"{1000 * second:.0f} ms with DAPE, {1000 * twin_second:.0f} ms with RoPE"
        print(f"a step took {milliseconds}, of processor time")


if __name__ == "__main__":
    main()
