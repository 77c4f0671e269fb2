"""The same run as `truthgpt train debug`, from Python.

python examples/python_api.py
"""

from truthgpt import build_components, build_trainer, load_config

if __name__ == "__main__":
    config = load_config("debug", ["output_dir=runs/python_api"])
    components = build_components(config)
    state = build_trainer(config, components).train()
    print(
        f"step {state.step}: best {config.eval.select_best_by} {state.best_metric:.2f}, model in runs/python_api/model"
    )
