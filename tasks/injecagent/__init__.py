"""InjecAgent: an agent's observation holds an instruction to call an attacker's tool."""
