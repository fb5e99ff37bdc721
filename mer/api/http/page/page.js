import { Chat } from "./chat.js";
import { follow } from "./live.js";

const chat = new Chat();
follow(server => {
  document.getElementById("model").textContent = server.name;
  chat.know(server);
});
