declare module "onnxruntime-web/*?url" {
  const address: string;
  export default address;
}
