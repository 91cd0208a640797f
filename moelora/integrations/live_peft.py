"""Take one adapter out of a live PeftModel. peft is imported here and nowhere above, inside the function."""

from typing import Any

from torch import Tensor, nn

from moelora.integrations.adapter_types import AdapterError, shown
from moelora.integrations.keys import strip_wrappers


def extract(model: nn.Module, adapter: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
    """State dict, config, and the scales that act now, by module path, of one adapter of a PeftModel.

    The tensors are the live ones, detached. The live scales count: `set_scale` and friends change them.

    Raises:
        AdapterError: for an adapter that is merged into the base, or that is no LoRA.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    assert isinstance(model, PeftModel)
    config = model.peft_config[adapter].to_dict()
    # a merged adapter has changed the base weights already: routed on top, it would act twice
    merged = [name for name, module in model.named_modules() if isinstance(module, LoraLayer) and module.merged]
    if merged:
        raise AdapterError(
            f"adapter {shown(adapter)} of the PeftModel: {len(merged)} layers are merged into the base, such as "
            f"{shown(merged[0])}; call unmerge_adapter() first"
        )
    if getattr(config.get("peft_type"), "value", config.get("peft_type")) != "LORA":
        return {}, config, {}  # refused by its config

    # no embedding layers: looking for them may ask the hub. The state dict is handed in, because PEFT warns of the
    # bias of lora_B in one that it makes itself.
    tensors = get_peft_model_state_dict(
        model, state_dict=model.state_dict(), adapter_name=adapter, save_embedding_layers=False
    )
    scales = {
        strip_wrappers(name): float(module.scaling[adapter])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    return {key: value.detach() for key, value in tensors.items()}, config, scales
