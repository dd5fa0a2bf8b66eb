"""The method: functions of tensors, each after one rule of the papers."""
