"""One module per `model_type`: the fields of its `config.json`, its tensors, and its `Decoder`."""
