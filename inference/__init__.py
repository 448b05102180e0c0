"""What a trained model is used for: measuring it, generating with it, chatting with it."""
