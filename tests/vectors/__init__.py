"""Agreement with frozen results of bitsandbytes, PEFT and transformers."""
