"""What several tests share: tiny models, small SAEs, stand-ins for servers and engines. No test is in here."""
