"""What the processes of one training share: who they are and what they agree on (group, watch), the model they step together (wrap), their saves (states)."""
