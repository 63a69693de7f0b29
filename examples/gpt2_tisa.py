"""GPT-2 gets TISA in place of its learned absolute positions, fine-tunes on real text, and reads four times as far.

A small GPT-2 is trained on bytes for a short while, as it is. Then one line gives each layer a TISA (Wennberg & Henter,
ACL 2021) and drops the absolute positions; the model trains on. Its twin trains as long with what it had. The loss, in
nats a byte, is that of held-out text read in pieces of the length trained at, and of four times that length, where
absolute positions were never trained. Last, the model is saved and loaded.

    python examples/gpt2_tisa.py              two minutes
    python examples/gpt2_tisa.py --quick      seconds

It printed, with one thread of a busy CPU:

    loss at length                           128       512
    GPT-2, absolute positions              2.565     2.666
    TISA attached, before fine-tuning      2.635     2.657
    TISA, fine-tuned                       2.348     2.385
    absolute, trained as long              2.334     2.788
    saved and loaded: largest difference of logits 0.0e+00
"""

from __future__ import annotations

import copy
import tempfile

import torch
from text import VOCABULARY, loss_at, options_of, read_text, train
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from posattn import TISA
from posattn.integrations.transformers import attach


def main() -> None:
    options = options_of(__doc__, steps=(250, "of each of the trainings"), length=(128, "trained at"))
    steps, length = (20, 64) if options.quick else (options.steps, options.length)
    training, held_out = read_text(options.text)
    read = 8 * length if options.quick else 64 * length

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=4 * length,
        n_embd=64 if options.quick else 128,
        n_layer=2 if options.quick else 4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).to(options.device)

    def report(name: str, model: torch.nn.Module) -> None:
        losses = [loss_at(model, held_out, n, read) for n in (length, 4 * length)]
        print(f"{name:34}" + "".join(f"{loss:10.3f}" for loss in losses), flush=True)

    print(f"{'loss at length':34}{length:10}{4 * length:10}", flush=True)
    train(model, training, length, steps)
    report("GPT-2, absolute positions", model)
    twin = copy.deepcopy(model)

    attach(model, lambda layer, heads: TISA(heads), positions="drop")
    report("TISA attached, before fine-tuning", model)
    train(model, training, length, steps)
    report("TISA, fine-tuned", model)
    train(twin, training, length, steps)
    report("absolute, trained as long", twin)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).to(options.device).eval()
    tokens = held_out[None, : 2 * length].long().to(options.device)
    with torch.no_grad():
        difference = (loaded(tokens).logits - model.eval()(tokens).logits).abs().max().item()
    print(f"saved and loaded: largest difference of logits {difference:.1e}")


if __name__ == "__main__":
    main()
