"""Other people's formats. peft: adapters as PEFT saves them."""
