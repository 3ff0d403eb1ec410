"""A Space that compares two models by their weights: what is asked, and how the answer is shown."""

from functools import cache

import gradio as gr
from comparison import Comparison, EmbeddedModel, Embedder, InputError, Settings, compare


SETTINGS = Settings.from_environment()
ABOUT = f"""# Two models, by their weights

A [weight-space backbone](https://arxiv.org/abs/2510.02096) reads the weights of both and makes a vector of each: one
for the whole model, one for every layer. Nothing is run and no data is used. Models of up to
{SETTINGS.max_bytes / 1e6:,.0f} MB, in safetensors; this takes seconds to minutes on a CPU.

**How to read it.** A cosine near 1 means that the weights look alike to this backbone, not that the models do the
same, that one was made from the other, or that either works well. Beside it stands a control: the same cosine after
the entries of every tensor of the second model were shuffled, which no model survives. Where the control is as high,
only shapes and statistics of the tensors are alike.
"""


@cache
def embedder() -> Embedder:
    """The backbone, loaded by the first visitor."""
    return Embedder(SETTINGS)


def answer(first_id: str, first_file: str | None, second_id: str, second_file: str | None) -> tuple[str, list, list]:
    """Answers the button: a summary or the reason why there is none, a table of facts, a table of layers."""
    try:
        model = embedder()
        first, second = model.embed(first_id, first_file), model.embed(second_id, second_file)
        result = compare(first, second, model.embed_shuffled(second))
    except InputError as error:
        return f"### Not compared\n\n{error}", [], []
    return summary(result, model.name), facts_table(first, second), layers_table(result)


def summary(result: Comparison, backbone: str) -> str:
    layers = f"{len(result.layers)} layers have the same name in both, and are compared one by one below."
    if not result.layers:
        layers = "No layer has the same name in both, so only the wholes can be compared."
    elif result.only_first or result.only_second:
        layers += f" {result.only_first} are in the first only, {result.only_second} in the second only."
    figures = f"Cosine of the whole models: {shown(result.cosine)}; with the second shuffled: {shown(result.control)}"
    return f"### {figures}\n\n{layers} Backbone: `{backbone}`."


def shown(cosine: float | None) -> str:
    return "not defined" if cosine is None else f"{cosine:.4f}"


def facts_table(first: EmbeddedModel, second: EmbeddedModel) -> list[list[str]]:
    rows = [["model", first.name, second.name]]
    rows.append(["numbers read", f"{first.num_parameters:,}", f"{second.num_parameters:,}"])
    for name in dict.fromkeys([*first.said, *second.said]):
        rows.append([name, first.said.get(name, "not stated"), second.said.get(name, "not stated")])
    return rows


def layers_table(result: Comparison) -> list[list[str]]:
    return [[layer.name, shown(layer.cosine), shown(layer.control)] for layer in result.layers]


with gr.Blocks(title="Models by their weights") as demo:
    gr.Markdown(ABOUT)
    with gr.Row():
        inputs = []
        for number in ("First", "Second"):
            with gr.Column():
                inputs.append(gr.Textbox(label=f"{number} model: Hub id", placeholder="timm/resnet18.a1_in1k"))
                inputs.append(gr.File(label="or a file", file_types=[".safetensors"], type="filepath", height=150))
    button = gr.Button("Compare", variant="primary")
    result = gr.Markdown()
    facts = gr.Dataframe(headers=["", "first", "second"], label="What was compared, and what its page says")
    layers = gr.Dataframe(headers=["layer", "cosine", "control"], label="Layers, the least alike first")
    button.click(answer, inputs, [result, facts, layers], concurrency_limit=1, api_name="compare")

if __name__ == "__main__":
    demo.queue(max_size=20).launch(max_file_size=SETTINGS.max_bytes, show_error=True)
